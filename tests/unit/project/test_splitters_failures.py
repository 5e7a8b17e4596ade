"""What the machine does to a command: a full disk, an interruption, a file that is not there; never a traceback."""

from __future__ import annotations

import argparse
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import splitters.cli as cli
from protos.errors import BundleError, ConfigError, ModelError, StorageError
from splitters.commands.common.failures import as_known
from tests.fakes.detector_bundle import write_cell_detector


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], int]], int]:
    def run(work: Callable[[], int]) -> int:
        def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
            subparsers.add_parser("inspect").set_defaults(run=lambda _: work())

        monkeypatch.setattr(cli, "import_module", lambda _: SimpleNamespace(add_parser=add_parser))
        return cli.main(["inspect"])

    return run


def full() -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/checkpoint.safetensors")


def full_in_rust() -> int:
    raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_beneath() -> int:
    try:
        full()
    except OSError as error:
        raise ValueError("the exporter failed") from error
    return 0


@pytest.mark.parametrize("work", [full, full_in_rust, full_beneath])
def test_a_full_disk_is_exit_12(
    verb: Callable[[Callable[[], int]], int], work: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(work) == 12
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("swallowed", [False, True])
def test_an_interruption_is_no_failure_whatever_a_library_makes_of_it(
    verb: Callable[[Callable[[], int]], int], number: int, code: int, swallowed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if swallowed:
                raise ModelError("the module cannot be exported to ONNX") from None
            raise
        return 0

    before = signal.getsignal(number)
    assert verb(work) == code
    assert "cannot be exported" not in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_our_own_faults_stay_visible(verb: Callable[[Callable[[], int]], int]) -> None:
    def work() -> int:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        verb(work)


def test_what_a_failure_stands_for() -> None:
    assert isinstance(as_known(FileNotFoundError(errno.ENOENT, "No such file or directory", "a")), ConfigError)
    assert isinstance(as_known(PermissionError(errno.EACCES, "Permission denied", "a")), StorageError)
    told = BundleError("altered")
    assert as_known(told) is told
    assert as_known(ValueError("ours")) is None
    beside = KeyError("ours")
    beside.__context__ = told  # raised while the other was handled: ours all the same
    assert as_known(beside) is None


def test_a_calibration_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_cell_detector(tmp_path / "bundle", prefilter=True)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments = ["calibrate", str(bundle.path), "--video", str(tmp_path / "clip.mp4"), "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 3
    assert "no video" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
