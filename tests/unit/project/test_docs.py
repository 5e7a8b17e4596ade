"""README and docs say what is true: their commands parse, their pages follow the code, and each block says whether it is run."""

import argparse
import re
import shlex
import subprocess
import sys

import pytest

from deploy.testbed import cli as testbed
from edge_client import cli as client
from edge_client.doctor import command as doctor
from edge_server import cli as server
from splitters import cli as splitters
from tests.fakes.docs import PAGES, ROOT, Block, blocks

PARSERS = {
    "edge-client": client.build_parser,
    "edge-server": server.build_parser,
    "splitters": splitters.build_parser,
    "edge-testbed": testbed.build_parser,
}
BLOCKS = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> list[list[str]]:
    lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
    parts = [part for line in lines for part in re.split(r"\s(?:&&|\|)\s|\s&$", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True)) and words[0] in PARSERS]


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_block_is_run_by_a_test_or_says_why_not() -> None:
    silent = [f"{b.page.relative_to(ROOT)}:{b.line}" for b in BLOCKS if not b.run and not b.reason]
    assert not silent, f"neither `<!-- run -->` nor `<!-- not run here: reason -->` stands before {silent}"
    assert sum(b.run for b in BLOCKS) >= 2


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "bash"], ids=lambda b: f"{b.page.name}:{b.line}")
def test_every_command_of_ours_has_the_options_that_are_written(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    for name, *words in commands(block):
        doctors = name == "edge-client" and words[:1] == ["doctor"]
        parser: argparse.ArgumentParser = doctor.build_parser() if doctors else PARSERS[name]()
        try:
            parser.parse_args(words[doctors:])
        except SystemExit:
            pytest.fail(f"{name} {shlex.join(words)}: {capsys.readouterr().err}")


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: f"{b.page.name}:{b.line}")
def test_every_block_of_python_can_be_compiled(block: Block) -> None:
    compile(block.text, f"{block.page.name}:{block.line}", "exec")


def test_the_reference_pages_follow_the_code() -> None:
    if sys.version_info[:2] != (3, 11):
        pytest.skip("argparse formats help differently from one Python to the next; the pages are written by 3.11")
    run = subprocess.run(
        [sys.executable, "docs/generate_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_links_between_pages_lead_somewhere() -> None:
    lost = [
        f"{page.relative_to(ROOT)} -> {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not lost
