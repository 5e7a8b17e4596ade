"""A disk that is soon full: a tmpfs of a few kilobytes. Needs root; without it the test is skipped, saying so."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _mount(*arguments: str) -> str:
    done = subprocess.run(("mount", *arguments), capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip() or "mount failed"


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    """Mounts it; ``size`` as tmpfs takes it, e.g. ``64k``."""
    at.mkdir()
    try:
        problem = _mount("-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(at))
    except FileNotFoundError:
        problem = "there is no mount command"
    if problem:
        pytest.skip(f"a small disk needs root and a tmpfs: {problem}")
    try:
        yield at
    finally:
        subprocess.run(("umount", "-l", str(at)), check=True)


def resize(at: Path, size: str) -> None:
    """Makes the disk larger."""
    problem = _mount("-o", f"remount,size={size}", str(at))
    assert not problem, problem
