"""Which files of a folder are pictures: by what they contain; a name that promises one counts, so that a broken one is noticed."""

from __future__ import annotations

from pathlib import Path

from protos.errors import SourceError
from splitters.runtime.pictures import PICTURE_SUFFIXES, content_of, files_below


def pictures_below(root: Path) -> list[Path]:
    """Every picture below ``root``, sorted; maybe none.

    Raises:
        SourceError: ``root`` is no directory, or cannot be listed.
    """
    if not root.is_dir():
        raise SourceError(f"{root} is no folder of photos" if root.exists() else f"{root} does not exist")
    return [f for f in files_below(root) if f.is_file() and (f.suffix.lower() in PICTURE_SUFFIXES or _holds_picture(f))]


def _holds_picture(path: Path) -> bool:
    try:
        return content_of(path) == "picture"
    except SourceError:
        return False
