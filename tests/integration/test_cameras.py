"""Several cameras in one real client: accounted for one by one, through one connection; one that fails touches no other."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_client.bundles.fetch import fetch_bundle
from edge_client.bundles.store import BundleStore
from edge_client.transport.rpc import Endpoint
from tests.fakes.client_process import write_clip
from tests.fakes.server_running import environment

pytestmark = pytest.mark.timeout(240)


def run(tmp_path: Path, text: str) -> tuple[int, dict[str, object], str]:
    config = tmp_path / "cameras.toml"
    config.write_text(text)
    command = [sys.executable, "-m", "edge_client.cli", "--config", str(config), "--json"]
    done = subprocess.run(
        command, env={**environment(), "HEADTAIL_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def test_three_files_are_three_cameras_and_a_fourth_that_fails_touches_none(tmp_path: Path, server: str) -> None:
    tables = "".join(
        f'[[camera]]\nname = "c{i}"\nsource = "{write_clip(tmp_path / f"{i}.avi", frames=10 + i)}"\n' for i in range(3)
    )
    broken = tmp_path / "broken.avi"
    broken.write_bytes(b"no video at all")
    tables += f'[[camera]]\nname = "broken"\nsource = "{broken}"\n'
    code, summary, err = run(
        tmp_path, f'server = "{server}"\nwait_for_server_s = 150\noutput = "{tmp_path}/{{camera}}.jsonl"\n{tables}'
    )
    assert code == 3, err
    assert "camera broken has ended" in err
    cameras = summary["cameras"]
    assert isinstance(cameras, dict)
    assert {name: cameras[name]["outcomes"]["result"] for name in ("c0", "c1", "c2")} == {"c0": 10, "c1": 11, "c2": 12}
    assert summary["frames"] == 33
    assert summary["balanced"] is True
    for i in range(3):
        lines = [json.loads(line) for line in (tmp_path / f"c{i}.jsonl").read_text().splitlines()]
        assert [line["frame"] for line in lines] == list(range(10 + i))
        assert {line["camera"] for line in lines} == {f"c{i}"}


async def test_cameras_that_want_the_same_new_bundle_fetch_it_once(
    tmp_path: Path, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="edge_client.bundles.fetch")
    stores = [BundleStore(tmp_path / "cache") for _ in range(8)]
    bundles = await asyncio.gather(*(fetch_bundle(Endpoint(address=server), s, model="", sha256="") for s in stores))
    assert len({b.sha256 for b in bundles}) == 1
    assert caplog.text.count("fetched bundle") == 1
    for store in stores:
        store.close()


def test_cameras_of_one_server_share_one_connection(tmp_path: Path, server: str) -> None:
    tables = "".join(f'[[camera]]\nname = "c{i}"\nsource = "synthetic:fps=5,size=160x120"\n' for i in range(4))
    config = tmp_path / "cameras.toml"
    config.write_text(f'server = "{server}"\noutput = "{tmp_path}/{{camera}}.jsonl"\nchange_gate = "off"\n{tables}')
    command = [sys.executable, "-m", "edge_client.cli", "--config", str(config), "--json"]
    process = subprocess.Popen(
        command, env={**environment(), "HEADTAIL_CACHE": str(tmp_path / "cache")}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        until_s = time.monotonic() + 100
        while True:
            outputs = [tmp_path / f"c{i}.jsonl" for i in range(4)]
            if all(p.exists() and p.read_text().count('"outcome":"result"') >= 3 for p in outputs):
                break
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until_s
            time.sleep(0.1)
        port = int(server.rpartition(":")[2])
        assert len(_connections(process.pid, port)) == 1
    finally:
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    summary = json.loads(out.strip().splitlines()[-1])
    assert summary["balanced"] is True
    assert len(summary["cameras"]) == 4


def _connections(pid: int, port: int) -> list[str]:
    """Established TCP connections of a process to a port, by its open descriptors."""
    inodes = {m[1] for fd in Path(f"/proc/{pid}/fd").iterdir() if (m := re.fullmatch(r"socket:\[(\d+)\]", str(fd.readlink())))}
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = row.split()
            if int(words[2].rpartition(":")[2], 16) == port and words[3] == "01" and words[9] in inodes:
                found.append(row)
    return found
