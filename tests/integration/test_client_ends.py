"""A client can be ended in every state: once in order, twice at once."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import cv2
import pytest

from tests.fakes.client_process import client
from tests.fakes.server_running import environment

CAMERA = ("--camera", "synthetic:fps=30,size=160x120", "--change-gate", "off")

_HANGING_HEAD = """
import sys, time
from edge_client import cli
from edge_client.pipeline.head_runner import HeadRunner
HeadRunner._shoot = lambda *_args, **_names: time.sleep(3600)
cli.entry()
"""


def start_hanging(server: str, cache: Path) -> subprocess.Popen[str]:
    """A client whose head never comes back, told to end."""
    line = [sys.executable, "-c", _HANGING_HEAD, *CAMERA, "--operating-point", "0", "--server", server]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env={**environment(), "HEADTAIL_CACHE": str(cache)})
    assert process.stderr is not None
    assert "no frames" in process.stderr.readline()  # the status line: it runs, and no frame has come through
    process.send_signal(signal.SIGINT)
    assert "another interrupt" in process.stderr.readline()
    return process


def test_a_second_interrupt_ends_at_once_while_a_head_hangs(server: str, cache: Path) -> None:
    process = start_hanging(server, cache)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=180)
    assert process.returncode == 130


def test_one_interrupt_is_enough_for_a_head_that_hangs_where_nobody_presses_twice(server: str, cache: Path) -> None:
    process = start_hanging(server, cache)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err


@pytest.mark.parametrize(("presses", "code"), [(1, 12), (2, 130)])
def test_a_client_whose_results_nobody_reads(tmp_path: Path, server: str, cache: Path, presses: int, code: int) -> None:
    line = [sys.executable, "-m", "edge_client.cli", "--camera", "synthetic:fps=300,size=64x48", "--change-gate", "off"]
    line += ["--server", server, "--output", "-"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=err, env={**environment(), "HEADTAIL_CACHE": str(cache)})
    try:
        assert process.stdout is not None
        wait_full(process.stdout.fileno())
        process.send_signal(signal.SIGTERM)
        if presses == 2:
            time.sleep(0.3)  # the first has been taken; the client gives its reader two seconds
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == code
    finally:
        process.kill()
        process.communicate()


def wait_full(pipe: int) -> None:
    """Until a pipe takes no more: what is in it grows no longer."""
    before, until = -1, time.monotonic() + 90
    while time.monotonic() < until:
        (now,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))
        if now == before and now > 32_768:
            return
        before = now
        time.sleep(0.5)
    raise AssertionError("the pipe did not fill")


def test_a_client_that_waits_for_a_reader_of_its_named_pipe(tmp_path: Path, server: str, cache: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for presses in (0, 1):
        with client(tmp_path, *CAMERA, "--frames", "20", "--server", server, "--output", str(pipe), cache=cache) as edge:
            assert edge.process.stderr is not None
            assert "nobody reads" in edge.process.stderr.readline()
            if presses:
                edge.process.send_signal(signal.SIGINT)
            else:
                with pipe.open() as reader:
                    assert len(reader.readlines()) == 20
            assert edge.process.wait(30) == 0


def test_a_hangup_flushes_and_closes(tmp_path: Path, server: str, cache: Path) -> None:
    """The terminal was closed: the clip has its end, and another hangup changes nothing."""
    clip = tmp_path / "clip.mp4"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup, which a client would heed
    with client(tmp_path, *CAMERA, "--server", server, "--json", "--save-video", str(clip), cache=cache) as edge:
        signal.signal(signal.SIGHUP, before)
        edge.wait_frame(20)
        for _ in range(3):
            edge.process.send_signal(signal.SIGHUP)
        done = edge.finish(timeout_s=30)
    assert done.code == 0, done.err
    assert done.summary["balanced"]
    assert len(done.lines) == done.summary["frames"]
    assert int(cv2.VideoCapture(str(clip)).get(cv2.CAP_PROP_FRAME_COUNT)) >= 20


def test_a_clip_whose_client_was_killed_can_be_played_to_where_it_was(tmp_path: Path, server: str, cache: Path) -> None:
    clip = tmp_path / "clip.mp4"
    with client(
        tmp_path, "--camera", "synthetic:fps=100,size=160x120", "--server", server, "--save-video", str(clip), cache=cache
    ) as edge:
        edge.wait_frame(1000)  # a fragment is written every four seconds
        edge.process.kill()
        edge.process.wait()
    capture, played = cv2.VideoCapture(str(clip)), 0
    while capture.read()[0]:
        played += 1
    assert played >= 400


@pytest.mark.parametrize("broken", ["stdout", "stderr", "both", "ascii", "home"])
def test_odd_consoles(tmp_path: Path, home: Path, server: str, cache: Path, broken: str) -> None:
    """Closed streams, an ASCII console and no HOME: the run is done, and its answers are where they were asked for."""
    photo = tmp_path / "fünf photo-\udcff.jpg"
    photo.write_bytes((home / "photos" / "photo-0.jpg").read_bytes())
    out = tmp_path / "out.jsonl"
    env = {**environment(), "HEADTAIL_CACHE": str(cache)}
    close = {"stdout": ">&-", "stderr": "2>&-", "both": "<&- >&- 2>&-"}.get(broken, "")
    if broken == "ascii":
        env |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    if broken == "home":
        env = {k: v for k, v in env.items() if k != "HOME"}
    line = f'exec "$0" -m edge_client.cli --camera "$1" --server {server} --output "$2" --json {close}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable, os.fsencode(photo), str(out)], capture_output=True, env=env, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert len(out.read_text().splitlines()) == 1
    assert out.read_text().startswith('{"frame":0,')


def test_results_for_a_closed_standard_output_are_refused(server: str, cache: Path) -> None:
    env = {**environment(), "HEADTAIL_CACHE": str(cache)}
    line = f'exec "$0" -m edge_client.cli --camera synthetic: --frames 5 --server {server} --output - >&-'
    done = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, text=True, env=env, timeout=180, check=False)
    assert done.returncode == 2, done.stderr
    assert "standard output is closed" in done.stderr
