"""The one reader of still pictures, for the client's files, calibration, training and evaluation alike.

What a file is, its content says, not its name. Orientation (EXIF and its relatives) is applied in every format. A picture that
cannot be read whole is an error that names the file; ``readable`` turns that into a warning and a count.

Shape legend: pictures are (H, W, 3) uint8 BGR.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from protos.errors import SourceError

log = logging.getLogger(__name__)

Picture = NDArray[np.uint8]

MAX_PIXELS: Final = 178_956_970
"""More are not decoded, as Pillow has it: they would be 537 MB, and a few kilobytes of PNG can claim far more."""

PICTURE_SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".gif", ".heic"}
)
"""Names that promise a picture: a file of that name which holds none is worth a warning of its own."""

MAX_SIDE_PX: Final = 32768
"""Of a side, as the protocol has it."""

_HEAD_BYTES: Final = 32
_SIGNATURES: Final = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"GIF87a", b"GIF89a",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51", b"#?RADIANCE", b"#?RGBE", b"v/1\x01",
)  # fmt: skip
_BRANDS: Final = frozenset({b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_ORIENTATION_TAG: Final = 0x0112
# EXIF orientation → (transpose, mirror left-right, mirror top-bottom), in this order.
_TURNS: Final = {
    2: (False, True, False), 3: (False, True, True), 4: (False, False, True), 5: (True, False, False),
    6: (True, True, False), 7: (True, True, True), 8: (True, False, True),
}  # fmt: skip

Content = Literal["picture", "animation", "other"]


def shipped_pictures() -> list[Picture]:
    """The photographs that scikit-image ships: a person, a cat, a cup, a rocket.

    Raises:
        SourceError: it is not installed.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise SourceError(
            "photographs are needed to choose the codec's scales: give --photos DIR, or install scikit-image, which ships four"
        ) from error
    taken: tuple[Callable[[], Picture], ...] = (data.astronaut, data.chelsea, data.coffee, data.rocket)
    return [picture()[..., ::-1].copy() for picture in taken]


def content_of(path: Path) -> Content:
    """What a file's first bytes say it is; a GIF of several frames is an ``animation``.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if not _is_picture(head):
        return "other"
    return "animation" if head.startswith(b"GIF8") and _frames(path) > 1 else "picture"


def _is_picture(head: bytes) -> bool:
    if head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    if head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3] in b" \t\r\n" and len(head) > 2:
        return True
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS


def _frames(path: Path) -> int:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return int(getattr(image, "n_frames", 1))
    except (OSError, ValueError, EOFError, SyntaxError):
        return 1


def read_picture(path: Path) -> Picture:
    """A file as a picture, upright.

    Raises:
        SourceError: it is no picture, is damaged or cut off, or has more than ``MAX_PIXELS``; the message says which.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a named pipe would wait for a writer for ever
            raise SourceError(f"{path} is no regular file")
        data = path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return decode_picture(data)
    except SourceError as error:
        raise SourceError(f"{path} {error.message}") from error


def decode_picture(data: bytes) -> Picture:
    """Encoded bytes as a picture, upright.

    Raises:
        SourceError: as ``read_picture``; the message is a predicate without its subject.
    """
    if not _is_picture(data[:_HEAD_BYTES]):
        raise SourceError("is no picture that can be read: it is empty" if not data else "is no picture that can be read")
    form, size_px, orientation = _header(data)
    if size_px[0] * size_px[1] > MAX_PIXELS or max(size_px) > MAX_SIDE_PX:
        raise SourceError(
            f"has {size_px[0]} x {size_px[1]} px; at most {MAX_PIXELS // 10**6} megapixels and sides of {MAX_SIDE_PX} px are read"
        )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        image = None
    if image is None or 0 in image.shape:
        raise SourceError("is no picture that can be read: it is damaged, cut off, or of a kind that OpenCV does not know")
    picture: Picture = image.astype(np.uint8, copy=False)
    # OpenCV turns a TIFF whatever it is told.
    return picture if form == "TIFF" else turned(picture, *_TURNS.get(orientation, (False, False, False)))


def _header(data: bytes) -> tuple[str, tuple[int, int], int]:
    """Format, (width, height) and EXIF orientation, as far as Pillow knows them; nothing is decoded."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, and of tags we do not read
            with Image.open(io.BytesIO(data)) as image:
                orientation = image.getexif().get(_ORIENTATION_TAG, 1)
                return str(image.format), image.size, orientation if isinstance(orientation, int) else 1
    except Image.DecompressionBombError:
        raise SourceError(f"has too many pixels; at most {MAX_PIXELS // 10**6} megapixels are read") from None
    except Exception as error:  # noqa: BLE001 - whatever a broken header makes Pillow raise: OpenCV judges the picture
        log.debug("no header: %s", error)
        return "", (0, 0), 1


def turned(picture: Picture, transpose: bool, mirror_x: bool, mirror_y: bool) -> Picture:
    """A picture transposed, then mirrored left-right and top-bottom, as asked."""
    if transpose:
        picture = cv2.transpose(picture).astype(np.uint8, copy=False)
    if mirror_x or mirror_y:
        code = -1 if mirror_x and mirror_y else 1 if mirror_x else 0
        picture = cv2.flip(picture, code).astype(np.uint8, copy=False)
    return picture


def files_below(root: Path) -> list[Path]:
    """Every entry below a directory that is no directory itself, in order of its path; links to directories stand for themselves.

    Raises:
        SourceError: the directory cannot be listed.
    """
    found: list[Path] = []

    def refuse(error: OSError) -> None:
        raise SourceError(f"directory {error.filename} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        here = Path(folder)
        found += [here / name for name in names]
        found += [here / name for name in folders if (here / name).is_symlink()]
    return sorted(found)


def readable(paths: Iterable[Path], *, unreadable: list[Path] | None = None) -> Iterator[tuple[Path, Picture]]:
    """The pictures among ``paths`` that can be read. Each that cannot is named in a warning, and added to ``unreadable``."""
    for path in paths:
        try:
            picture = read_picture(path)
        except SourceError as error:
            log.warning("%s; it is left out", error.message)
            if unreadable is not None:
                unreadable.append(path)
        else:
            yield path, picture
