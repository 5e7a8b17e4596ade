"""Names, ours, a program's own and installed packages'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from protos.errors import BundleError, ConfigError
from splitters.registry import Registry

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a package with entry points of the group ``headtail.toys`` visible."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(package: str, code: str, **points: str) -> None:
        (tmp_path / f"{package}.py").write_text(code, encoding="utf-8")
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
        rows = "".join(f"{name} = {value}\n" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[headtail.toys]\n{rows}", encoding="utf-8")

    return write


def toys() -> Registry[Callable[[], object]]:
    return Registry("headtail.toys", "toy", {"counter": "collections:Counter"}, error=BundleError)


def test_ours_are_loaded_when_asked_for() -> None:
    from collections import Counter

    assert toys().get("counter") is Counter
    assert toys().names() == ["counter"]


def test_an_unknown_name_lists_the_known_ones_and_says_how_to_add_one() -> None:
    with pytest.raises(BundleError, match=r"toy 'ball' is unknown; there are counter; .*headtail\.toys"):
        toys().get("ball")


def test_a_program_registers_its_own_but_takes_nobodys_name() -> None:
    registry = toys()
    registry.register("ball")(dict)
    assert registry.get("ball") is dict
    for name in ("ball", "counter"):
        with pytest.raises(ConfigError, match="already"):
            registry.register(name)(dict)


def test_an_installed_package_is_found_by_its_entry_point(install: Install) -> None:
    install("toy_box_a", "class Ball: ...", ball="toy_box_a:Ball")
    assert toys().names() == ["counter", "ball"]
    assert toys().get("ball").__name__ == "Ball"


def test_two_packages_of_one_name_are_told_apart(install: Install) -> None:
    install("toy_box_b", "class Ball: ...", ball="toy_box_b:Ball")
    install("toy_box_c", "class Ball: ...", ball="toy_box_c:Ball")
    with pytest.raises(ConfigError, match=r"toy_box_b 1\.0, toy_box_c 1\.0|toy_box_c 1\.0, toy_box_b 1\.0"):
        toys().get("ball")


def test_a_package_that_cannot_be_loaded_is_named(install: Install) -> None:
    install("toy_box_d", "raise RuntimeError('no battery')", ball="toy_box_d:Ball", number="toy_box_d:x")
    with pytest.raises(ConfigError, match=r"toy 'ball' of toy_box_d 1\.0 cannot be loaded: RuntimeError: no battery"):
        toys().get("ball")
    install("toy_box_e", "x = 5", five="toy_box_e:x")
    with pytest.raises(ConfigError, match="no class or function"):
        toys().get("five")


def test_only_who_sits_at_the_machine_may_name_a_module() -> None:
    from collections import OrderedDict

    assert toys().find("collections:OrderedDict") is OrderedDict
    with pytest.raises(BundleError, match="unknown"):
        toys().get("collections:OrderedDict")
