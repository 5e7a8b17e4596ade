"""A COCO ``instances.json`` as people make them, read through a schema, and what its categories are to a model's classes."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from protos.errors import ConfigError, MissingDependencyError

log = logging.getLogger(__name__)


class Image(msgspec.Struct):
    """A photo."""

    id: int
    file_name: str
    width: int | None = None
    height: int | None = None


class Category(msgspec.Struct):
    """A class of objects."""

    id: int
    name: str | None = None


class Annotation(msgspec.Struct):
    """An object: a box (x, y, width, height) in pixels."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    area: float | None = None
    ignore: int = 0


class Instances(msgspec.Struct):
    """The file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


def read_instances(path: Path) -> Instances:
    """The checked content of a COCO instances file.

    Raises:
        ConfigError: absent, not JSON, not such a file, or at odds with itself.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give a COCO instances.json") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; give a COCO instances.json") from error
    try:
        found = msgspec.json.decode(data, type=Instances)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no COCO instances file: {error}") from error
    _consistent(found, path)
    return found


def _consistent(found: Instances, path: Path) -> None:
    images, categories = {i.id for i in found.images}, {c.id for c in found.categories}
    if len(images) != len(found.images) or len(categories) != len(found.categories):
        raise ConfigError(f"{path} gives the same id to two images, or to two categories")
    for number, one in enumerate(found.annotations):
        if one.image_id not in images or one.category_id not in categories:
            raise ConfigError(
                f"{path}: annotation {number} is of image {one.image_id} and category {one.category_id}; the file lists no such "
                f"{'category' if one.image_id in images else 'image'}"
            )
        if not all(map(isfinite, one.bbox)) or min(one.bbox[2:]) < 0 or one.iscrowd not in (0, 1):
            raise ConfigError(f"{path}: annotation {number} has the box {list(one.bbox)}, which is none (x, y, width, height)")


def truth_of(found: Instances) -> Any:
    """The same as a pycocotools ``COCO``.

    Raises:
        MissingDependencyError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise MissingDependencyError("pycocotools is not installed; run: pip install 'headtail[train]'") from error
    rows = [
        {
            "id": number, "image_id": a.image_id, "category_id": a.category_id, "bbox": list(a.bbox), "iscrowd": a.iscrowd,
            "ignore": a.ignore, "area": a.bbox[2] * a.bbox[3] if a.area is None else a.area,
        }
        for number, a in enumerate(found.annotations, 1)
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {}, "images": [msgspec.to_builtins(i) for i in found.images], "annotations": rows,
            "categories": [msgspec.to_builtins(c) for c in found.categories],
        }  # fmt: skip
        truth.createIndex()
    return truth


def classes_of(found: Instances, labels: Mapping[int, str], path: Path) -> dict[int, int]:
    """Model class id → category id of the file, by the classes' names; categories that the model does not know have none.

    Args:
        found: the file's content.
        labels: the model's class ids and names.
        path: the file, for errors.

    Raises:
        ConfigError: categories without names, two of one name, or none that the model knows.
    """
    occurring = {a.category_id for a in found.annotations}
    named: dict[str, int] = {}
    for category in found.categories:
        if category.name is None or not category.name.strip():
            raise ConfigError(f"{path}: category {category.id} has no name; classes are matched by name")
        if (name := _plain(category.name)) in named:
            raise ConfigError(f"{path} has two categories of the name {category.name!r}")
        named[name] = category.id
    classes = {_plain(name): class_id for class_id, name in labels.items()}
    if len(classes) != len(labels):
        twice = next(name for name in labels.values() if [_plain(n) for n in labels.values()].count(_plain(name)) > 1)
        raise ConfigError(f"the bundle calls two classes {twice!r}: boxes cannot be matched with {path} by name")
    unknown = [c.name for c in found.categories if c.id in occurring and _plain(str(c.name)) not in classes]
    if len(unknown) == len(occurring):
        some = ", ".join(sorted(labels.values())[:5]) or "no names"
        raise ConfigError(
            f"none of the categories in {path} is a class of this model: {_listed(unknown)}; its classes are {some} …"
        )
    if unknown:
        log.warning("%s: the model knows no %s; these objects are left out", path.name, _listed(unknown))
    return {class_id: named[name] for name, class_id in classes.items() if name in named}


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


def _listed(names: Sequence[str | None]) -> str:
    shown = ", ".join(str(n) for n in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
