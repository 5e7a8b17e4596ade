"""The one door for data from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import BundleError, ConfigError, HeadtailError
from protos.schema import checked, read_json, read_toml


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    labels: Mapping[int, str] = field(default_factory=dict)
    named: Mapping[str, Inner] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)
    on: bool = False

    def __post_init__(self) -> None:
        if self.count == 13:
            raise BundleError("unlucky")


def test_what_is_right_becomes_the_type() -> None:
    text = b'{"count": 1, "many": [{"share": 1}], "labels": {"3": "cat"}, "named": {"a": {}}, "free": {"x": [1, {"y": null}]}}'
    value = read_json(text, Outer, what="x")
    assert value == Outer(count=1, many=(Inner(share=1.0),), labels={3: "cat"}, named={"a": Inner()}, free={"x": [1, {"y": None}]})


WRONG = {
    b"": "not JSON",
    b"\xff": "not JSON",
    b"[" * 200_000: "not JSON|deep",
    b"[" * 200_000 + b"]" * 200_000: "deep",
    b'{"count": 1, "free": {"x": ' + b"[" * 50 + b"]" * 50 + b"}}": "deep",
    b"[]": "object",
    b"{}": "count",
    b'{"count": "1"}': "count",
    b'{"count": true}': "count",
    b'{"count": 1.5}': "count",
    b'{"count": null}': "count",
    b'{"count": NaN}': "not JSON",
    b'{"count": 1e999}': "range",
    b'{"count": 1' + b"0" * 30 + b"}": "large number",
    b'{"count": 1' + b"0" * 9000 + b"}": "range",
    b'{"count": 1, "free": {"x": 1e999}}': "range",
    b'{"count": 1, "on": "false"}': "on",
    b'{"count": 1, "on": 0}': "on",
    b'{"count": 1, "surprise": 1}': "unknown name 'surprise'",
    b'{"count": 1, "inner": {"surprise": 1}}': "unknown name 'surprise'",
    b'{"count": 1, "many": [{"surprise": 1}]}': "unknown name 'surprise'",
    b'{"count": 1, "named": {"a": {"surprise": 1}}}': "unknown name 'surprise'",
    b'{"count": 1, "many": {"share": 1}}': "many",
    b'{"count": 1, "inner": {"share": 1.01}}': "share",
    b'{"count": 1, "labels": {"x": "y"}}': "labels",
    b'{"count": 13}': "unlucky",
    b'"' + b"a" * (9 << 20) + b'"': "bytes",
}


@pytest.mark.parametrize(("text", "says"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_wrong_is_one_error_of_the_right_kind(text: bytes, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        read_json(text, Outer, what="manifest.json")


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_anything_else_is_a_value_or_an_error_of_ours(text: bytes | str) -> None:
    with contextlib.suppress(BundleError):
        read_json(text, Outer, what="x")


def test_toml() -> None:
    assert read_toml('deadline-ms = 5\nserver = "a"', what="x") == {"deadline_ms": 5, "server": "a"}
    for text in ("a = ", "a = 1\na = 2", "a-b = 1\na_b = 2", "a = " + "[" * 5000 + "]" * 5000, "a = \x00"):
        with pytest.raises(ConfigError):
            read_toml(text, what="x")
    for number in ("nan", "inf", "-inf", "1e999", "9223372036854775808", "1" + "0" * 5000):
        with pytest.raises(HeadtailError):
            checked(read_toml(f"count = {number}", what="x"), Outer, what="x", error=ConfigError)
    with pytest.raises(ConfigError, match="count"):
        checked(read_toml("count = 1979-05-27", what="x"), Outer, what="x", error=ConfigError)
