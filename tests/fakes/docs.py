"""The blocks of commands and of Python in README and docs."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"(?:^<!-- (run|not run here)(?:: ([^\n]+?))? -->\n)?^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced ``bash`` or ``python`` block: whether a test runs it, or why none does."""

    page: Path
    line: int
    language: str
    text: str
    run: bool
    reason: str


def blocks(page: Path) -> list[Block]:
    """All of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: m.start(4)].count("\n"), m[3], m[4], m[1] == "run", (m[2] or "") if m[1] == "not run here" else "")
        for m in _BLOCK.finditer(text)
    ]
