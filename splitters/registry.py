"""One seam for every extension: a name that a person or a bundle gives → what is registered under it.

Ours are known by their place and loaded when first asked for, so that a device never imports what only a server needs. Others
come from installed packages by an entry point of the registry's group; nothing of ours changes for them. The style is that of
CompressAI's and timm's registries.

    @TASKS.register("parity")                       # in a program of your own
    class Parity(Task): ...

    [project.entry-points."headtail.tasks"]         # in your package's pyproject.toml
    parity = "my_package:Parity"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar, cast

from protos.errors import ConfigError, HeadtailError

T = TypeVar("T")


class Registry(Generic[T]):
    """What is known under a name.

    Args:
        group: of the entry points, e.g. ``headtail.tasks``.
        what: one of its members, in an error's words.
        ours: name → ``module:attribute`` of those that come with headtail.
        error: raised for a name that nobody registered.
    """

    def __init__(
        self, group: str, what: str, ours: Mapping[str, str] | None = None, *, error: type[HeadtailError] = ConfigError
    ) -> None:
        self.group = group
        self._what = what
        self._ours = dict(ours or {})
        self._error = error
        self._made: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator: registers a class or function of this process under ``name``, which nobody may have yet.

        Raises:
            ConfigError: somebody has it.
        """

        def keep(member: T) -> T:
            if name in self.names():
                raise ConfigError(f"a {self._what} named {name!r} is registered already")
            self._made[name] = member
            return member

        return keep

    def get(self, name: str) -> T:
        """What is registered under ``name``. A bundle or a peer may choose the name: nothing is imported but what is registered.

        Raises:
            HeadtailError: of the registry's class: nobody registered it; the message lists the names there are.
            ConfigError: the package that registered it cannot be loaded, or two packages have.
        """
        if name not in self._made:
            if name in self._ours:
                self._made[name] = self._load(self._ours[name], f"{self._what} {name!r}")
            else:
                self._made[name] = self._of_a_package(name)
        return self._made[name]

    def find(self, name: str) -> T:
        """As `get`; of ``module:attribute`` that attribute. For names that the person at this machine gives, and no others.

        Raises:
            HeadtailError: see `get`.
        """
        return self._load(name, f"{self._what} {name}") if ":" in name and name not in self.names() else self.get(name)

    def names(self) -> list[str]:
        """All names, ours first."""
        others = {e.name for e in entry_points(group=self.group)} | self._made.keys()
        return [*self._ours, *sorted(others - self._ours.keys())]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def _of_a_package(self, name: str) -> T:
        found = list(dict.fromkeys(entry_points(group=self.group, name=name)))
        if not found:
            raise self._error(
                f"{self._what} {name[:100]!r} is unknown; there are {', '.join(self.names())}; "
                f"an installed package can add one by an entry point of the group {self.group}"
            )
        if len({e.value for e in found}) > 1:
            raise ConfigError(f"{self._what} {name!r} is registered by several packages: {', '.join(map(_origin, found))}")
        return self._load(found[0].value, f"{self._what} {name!r} of {_origin(found[0])}")

    def _load(self, place: str, what: str) -> T:
        module, _, attribute = place.partition(":")
        try:
            member: Any = import_module(module)
            for part in attribute.split("."):
                member = getattr(member, part)
        except HeadtailError:
            raise
        except Exception as error:  # a package of others may fail in any way
            raise ConfigError(f"{what} cannot be loaded: {type(error).__name__}: {error}") from error
        if not callable(member):
            raise ConfigError(f"{what} is no class or function")
        return cast("T", member)


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
