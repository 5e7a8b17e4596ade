"""Which photo a labels' file means: by its path relative to the photos' folder, as far as both tell it; never by guessing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from protos.errors import ConfigError

Parts = tuple[str, ...]


def pair(files: Sequence[Path], root: Path | None, names: Iterable[str], what: str) -> dict[Path, str]:
    """The name that stands for each photo; photos without one are left out.

    A name that is the photo's path below ``root`` is taken first. Else the shorter of the two paths must be the end of the
    longer one, and only one name may fit the photo, and only one photo the name.

    Args:
        files: the photos.
        root: their folder; None where it is not known.
        names: as they stand in the labels' file.
        what: the labels' file, for an error.

    Raises:
        ConfigError: two names are the same file, or it cannot be told which photo a name means.
    """
    known: dict[Parts, str] = {}
    for name in names:
        parts = _parts(name)
        if not parts:
            raise ConfigError(f"{what} names a photo {name!r}, which is no file name")
        if parts in known:
            raise ConfigError(f"{what} names the photo {name!r} twice")
        known[parts] = name
    below = {f: _below(f, root) for f in files}
    found = {f: known[parts] for f, parts in below.items() if parts in known}
    taken = set(found.values())
    by_last: dict[str, list[Parts]] = {}
    for parts, name in known.items():
        if name not in taken:
            by_last.setdefault(parts[-1], []).append(parts)
    meant: dict[str, Path] = {}
    for f in files:
        if f in found or f.name not in by_last:
            continue
        fitting = [known[p] for p in by_last[f.name] if _ends(f.resolve().parts, p) or _ends(p, below[f])]
        if len(fitting) > 1:
            raise ConfigError(f"{what} names both {fitting[0]!r} and {fitting[1]!r}: which of them is {'/'.join(below[f])}?")
        if fitting and fitting[0] in meant:
            first = "/".join(below[meant[fitting[0]]])
            raise ConfigError(
                f"{what} names {fitting[0]!r}, which may be {first} or {'/'.join(below[f])}: name it by its path there"
            )
        if fitting:
            meant[fitting[0]] = f
    found.update({f: name for name, f in meant.items()})
    return {f: found[f] for f in files if f in found}


def _parts(name: str) -> Parts:
    return tuple(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))


def _below(file: Path, root: Path | None) -> Parts:
    return file.relative_to(root).parts if root is not None and file.is_relative_to(root) else (file.name,)


def _ends(longer: Parts, shorter: Parts) -> bool:
    return len(shorter) <= len(longer) and longer[len(longer) - len(shorter) :] == shorter
