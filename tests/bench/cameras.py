"""Ten cameras in one process beside ten processes: frames answered, fairness, processor time and memory.

    HEADTAIL_DATA=... python -m tests.bench.cameras [--cameras 10] [--fps 5] [--frames 150] [--model detector] [--beside N]

The cameras are the clips in ``$HEADTAIL_DATA/video``, in turn, played at ``--fps``; their server is a process of its own,
and is not counted. Memory is the sum of each client process's proportional share (PSS), at most; ``waited_s`` is for how long their
threads could have run and had no core. ``--beside`` runs so many endless loops beside the clients. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_client.observe.fairness import jain
from tests.fakes.server_running import child, environment

_START_S = 120.0


def pss_bytes(pid: int) -> int:
    """What a process holds; pages that it shares with others count in part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_s(pid: int) -> float:
    """Processor seconds so far, user and system."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def waited_s(pid: int) -> float:
    """Seconds that the threads of a process stood ready and had no core."""
    return sum(int(path.read_text().split()[1]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


@contextmanager
def other_work(processes: int) -> Iterator[None]:
    """Other programs of the machine, which take what processor time they can get."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def sit(commands: list[list[str]], cache: Path, seconds: float) -> dict[str, Any]:
    """Runs clients side by side and looks at them before they end."""
    env = {**environment(), "HEADTAIL_CACHE": str(cache)}
    running = [subprocess.Popen(c, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for c in commands]
    begin_s = time.monotonic()
    memory, used, waited = 0, 0.0, 0.0
    while any(p.poll() is None for p in running):
        time.sleep(0.5)
        alive = [p.pid for p in running if p.poll() is None]
        if len(alive) == len(running):
            try:
                memory, used = max(memory, sum(map(pss_bytes, alive))), sum(map(cpu_s, alive))
                waited = sum(map(waited_s, alive))
            except OSError:
                continue
        assert time.monotonic() - begin_s < seconds * 4 + _START_S, "the clients do not end"
    cameras: list[dict[str, Any]] = []
    for process in running:
        summary = json.loads(process.communicate()[0].strip().splitlines()[-1])
        cameras += list(summary["cameras"].values()) if "cameras" in summary else [summary]
    outcomes: Counter[str] = Counter()
    for camera in cameras:
        outcomes.update(camera["outcomes"])
    answered = [(c["outcomes"]["result"] + c["outcomes"]["local"]) / c["frames"] for c in cameras]
    return {
        "frames": sum(c["frames"] for c in cameras), "balanced": all(c["balanced"] for c in cameras),
        "answered": round(sum(answered) / len(answered), 4), "least_answered": round(min(answered), 4),
        "jain": round(jain(answered), 4),
        "outcomes": {name: n for name, n in outcomes.items() if n},
        "memory_mib": round(memory / 2**20), "cpu_s": round(used, 1), "waited_s": round(waited, 1),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> int:
    """The bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cameras", type=int, default=10)
    parser.add_argument("--fps", type=float, default=5)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--model", default="detector")
    parser.add_argument("--only", choices=("one", "many"), help="one process only, or one process for each camera only")
    parser.add_argument("--beside", type=int, default=0, help="endless loops beside the clients")
    args = parser.parse_args()
    clips = sorted((Path(os.environ["HEADTAIL_DATA"]) / "video").iterdir())
    chosen = [clips[i % len(clips)] for i in range(args.cameras)]
    found: dict[str, Any] = {}
    python = [sys.executable, "-m", "edge_client.cli"]
    with tempfile.TemporaryDirectory() as tmp, child(Path(tmp), Path(args.model)) as server:
        cache = Path(tmp) / "cache"
        pace = ["--realtime", "--loop", "--fps", str(args.fps), "--frames", str(args.frames), "--server", server.address, "--json"]
        subprocess.run(
            [*python, "--camera", "synthetic:", "--frames", "5", "--server", server.address],
            env={**environment(), "HEADTAIL_CACHE": str(cache)}, check=True, capture_output=True,
        )  # fmt: skip
        tables = "".join(f'[[camera]]\nname = "c{i}"\nsource = "{clip}"\n' for i, clip in enumerate(chosen))
        config = Path(tmp) / "cameras.toml"
        config.write_text(tables)
        with other_work(args.beside):
            if args.only != "many":
                found["one process"] = sit([[*python, "--config", str(config), *pace]], cache, args.frames / args.fps)
            if args.only != "one":
                found["many processes"] = sit([[*python, "--camera", str(c), *pace] for c in chosen], cache, args.frames / args.fps)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
