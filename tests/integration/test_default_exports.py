"""Two processes that need the same default bundle at the same moment: one makes it, both have it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from splitters.bundle import open_bundle
from tests.fakes.server_running import environment

_NEEDS_IT = """
import sys, time
from pathlib import Path
from splitters.zoo import defaults
from tests.fakes.bundles import write_tiny_bundle

def export(out):
    with Path(sys.argv[1]).open("a") as made:
        print("made", file=made)
    print("exporting", flush=True)
    sys.stdin.readline()
    return write_tiny_bundle(out)

defaults.EXPORTERS = {"tiny": export}
print("begins", flush=True)
print(defaults.ensure_exported("tiny"), flush=True)
"""


def needs_it(made: Path, cache: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", _NEEDS_IT, str(made)]
    env = {**environment(), "HEADTAIL_CACHE": str(cache)}
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def test_processes_that_need_a_default_together_make_it_once(tmp_path: Path) -> None:
    made, cache = tmp_path / "made", tmp_path / "cache"
    first = needs_it(made, cache)
    assert first.stdout is not None
    assert [first.stdout.readline() for _ in range(2)] == ["begins\n", "exporting\n"]
    second = needs_it(made, cache)
    assert second.stdout is not None
    assert second.stdout.readline() == "begins\n"
    told, _ = first.communicate("\n", timeout=180)
    also, _ = second.communicate("\n", timeout=180)
    assert told == also
    assert open_bundle(Path(told.strip())).manifest.name == "tiny"
    assert made.read_text() == "made\n"
