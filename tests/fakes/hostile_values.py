"""Values nobody should send, put into trees that are otherwise right."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

NAMES = (
    "../../victim", "/etc/passwd", "manifest.json", "a" * 300, "device/stem.onnx", "operating_points.json/x", "", ".",
    "\x1b[2J\r\n", "\u202egnp", "a\x00b", "/".join("a" * 90), "é", "NaN", "1", "-1", "0x10", "a" * 5000,
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 255, 65_536, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.5, 1e-300, 1e30, 1e38, 1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
ODD: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": {}}, [None], "x", {"a": [1, {"b": []}]})


def value(rng: random.Random) -> Any:
    """One of them."""
    kind = rng.randrange(20)
    if kind == 0:
        deep: Any = 0
        for _ in range(rng.choice((5, 30, 400))):
            deep = [deep] if kind % 2 else {"x": deep}
        return deep
    return copy.deepcopy(rng.choice((NAMES, NUMBERS, ODD)[kind % 3]))


def hostile(rng: random.Random, tree: Any, changes: int = 0) -> Any:
    """A copy with one to three values replaced, removed, repeated or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(changes or rng.randint(1, 3)):
        tree = _changed(rng, tree)
    return tree


def _changed(rng: random.Random, tree: Any) -> Any:
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.15:
        return value(rng)
    at = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
    kind = rng.random()
    if kind < 0.7:
        tree[at] = _changed(rng, tree[at])
    elif kind < 0.8:
        del tree[at]
    elif isinstance(tree, dict):
        tree[rng.choice(NAMES) if kind < 0.9 else f"{at}_"] = tree[at]
    else:
        tree += [copy.deepcopy(tree[at])] * rng.choice((1, 2, 2000 if kind > 0.99 else 3))
    return tree


def as_json(rng: random.Random, tree: Any) -> bytes:
    """As text; sometimes cut, or nested far deeper than any parser likes."""
    text = json.dumps(tree).encode()
    kind = rng.randrange(60)
    if kind == 0:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 1:
        return b"[" * 50_000 + text + b"]" * rng.choice((0, 50_000))
    if kind == 2:
        return b"\xff\xfe" + text
    return text


def as_toml(rng: random.Random, names: Sequence[str]) -> str:
    """Settings, some of them of the right kind."""
    lines = []
    for name in rng.sample(list(names), rng.randint(1, 4)):
        kind = rng.randrange(8)
        if kind == 0:
            lines.append(f"{name} = {'[' * rng.choice((2, 3000))}")
        elif kind == 1:
            lines.append(f"{name} = 1979-05-27T07:32:00Z")
        else:
            chosen = value(rng)
            text = (
                json.dumps(chosen).replace("NaN", "nan").replace("Infinity", "inf") if not isinstance(chosen, dict) else "{x = 1}"
            )
            lines.append(f"{name if rng.random() < 0.9 else rng.choice(NAMES)} = {text}")
    return "\n".join(lines)
