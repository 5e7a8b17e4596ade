"""What every command does first and last, seen from outside."""

import os
import subprocess
import sys

import pytest

from protos.version import package_version

PROGRAM = (
    "import os, sys, threading, time\n"
    "from protos.process import leave, steady_streams\n"
    "steady_streams()\n"
    "taken = os.open('/dev/null', os.O_RDONLY)\n"
    "print('tr\\u00e4ger \\u2192', file=sys.stdout)\n"
    "print('tr\\u00e4ger', file=sys.stderr)\n"
    "threading.Thread(target=time.sleep, args=(600,)).start()\n"
    "leave(7 if taken > 2 else 8)\n"
)


def closed(*numbers: int) -> None:
    for number in numbers:
        os.close(number)


@pytest.mark.parametrize("numbers", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_and_an_ascii_console_are_no_error_and_no_thread_is_waited_for(numbers: tuple[int, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, timeout=60, check=False, preexec_fn=lambda: closed(*numbers),
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    if 1 not in numbers:
        assert done.stdout == rb"tr\xe4ger \u2192" + b"\n"
    if 2 not in numbers:
        assert done.stderr == rb"tr\xe4ger" + b"\n"


def test_the_server_tells_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_server", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"edge-server {package_version()}\n"
