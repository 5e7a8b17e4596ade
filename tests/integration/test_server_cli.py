"""``edge-server`` as a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from splitters.bundle import Bundle
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_client import Device, picture, session
from tests.fakes.server_running import child, command, environment


async def test_it_serves_and_ends_with_0_on_sigterm(bundle: Bundle, tmp_path: Path) -> None:
    with child(tmp_path, bundle.path) as server:
        async with session(server.address, bundle.sha256) as stream:
            assert (await stream.frame(Device(bundle).layers(picture(), 0))).error is None
        assert server.stop() == 0
        log = next(tmp_path.glob("*.log")).read_text()
        assert f"listening on {server.address}" in log
        assert "Traceback" not in log
    assert not list(tmp_path.glob("port-*.txt"))


def refusal(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=180, env=environment(), check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_wrong_settings_end_with_a_sentence_and_their_exit_code(bundle: Bundle, tmp_path: Path) -> None:
    model = ("--model", str(bundle.path))
    altered = write_tiny_bundle(tmp_path / "altered")
    (altered.path / "device" / "stem.onnx").write_bytes(b"x")
    code, text = refusal("--model", str(altered.path))
    assert (code, "truncated or altered" in text) == (4, True)
    code, text = refusal(*model, "--backend", "nonsense")
    assert (code, "nonsense" in text) == (2, True)
    code, text = refusal("--model", "no-such-model")
    assert (code, "no default model" in text) == (5, True)


def test_settings_are_checked_before_anything_is_loaded() -> None:
    from edge_server.cli import main

    for arguments in (
        ["--model", "m", "--listen", "nowhere"],
        ["--model", "m", "--tls-cert", "x.pem"],
        ["--model", "m", "--frames-per-s-per-token", "5"],
        ["--model", "m", "--max-batch", "0"],
        ["--model", "m", "--tail-cpus", "a,b"],
        ["--model", "m", "--max-payload-mib", "4096"],
    ):
        assert main(arguments) == 2


def test_it_warns_when_open_to_other_machines(bundle: Bundle, tmp_path: Path) -> None:
    with child(tmp_path, bundle.path, listen="0.0.0.0:0") as server:
        assert server.stop() == 0
    assert "without TLS or token" in next(tmp_path.glob("*.log")).read_text()


def test_it_does_not_outlive_its_parent(bundle: Bundle, tmp_path: Path) -> None:
    port_file = tmp_path / "port.txt"
    arguments = command("--listen", "127.0.0.1:0", "--port-file", str(port_file), "--model", str(bundle.path))
    script = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen({arguments!r} + ['--parent-pid', str(os.getpid())])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(120)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        until = time.monotonic() + 60
        while not port_file.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert port_file.exists()
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    until = time.monotonic() + 15
    while (
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] and time.monotonic() < until
    ):
        time.sleep(0.05)
    gone = not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert gone


def test_help_teaches() -> None:
    done = subprocess.run(command("--help"), capture_output=True, text=True, timeout=180, check=True)
    for word in ("--listen", "--model", "SIGTERM", "exit codes", "examples"):
        assert word in done.stdout
