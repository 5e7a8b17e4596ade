r"""Text of others made safe to show: a peer's words, names of files, labels.

A terminal obeys what it is sent: an escape sequence clears the screen, renames the window or forges a line of the log, and a
right-to-left mark turns a name round. Such characters are shown as what they are, ``\x1b``.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

MAX_CHARS: Final = 2000

_BREAKS = re.compile(r"[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_JOINERS: Final = "\u200c\u200d"  # scripts are written with them, and they move nothing


def printable(text: str, *, max_chars: int = MAX_CHARS) -> str:
    """One line that a terminal shows and does not obey; line breaks become spaces, what is longer is cut.

    Args:
        text: from anywhere.
        max_chars: of the text; an ellipsis says that there was more.
    """
    if len(text) > max_chars:
        text = text[:max_chars] + "…"
    if text.isprintable():
        return text
    return "".join(map(_shown, _BREAKS.sub(" ", text)))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def ascii_escaped(json_text: str) -> str:
    r"""JSON of the same value in which no character is left that a terminal could obey; as ``\uXXXX``."""
    if json_text.isprintable():
        return json_text
    return "".join(c if c.isprintable() or c in " \n" else _json_escape(c) for c in json_text)


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
