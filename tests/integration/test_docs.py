"""Every block of README and docs that is marked ``<!-- run -->`` is run as it stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.docs import PAGES, Block, blocks

RUN = [block for page in PAGES for block in blocks(page) if block.run]


@pytest.mark.parametrize("block", RUN, ids=lambda b: f"{b.page.name}:{b.line}")
def test_the_commands_do_what_they_say(block: Block, tmp_path: Path) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    run = subprocess.run([*command, block.text], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
