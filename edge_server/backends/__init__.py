"""What runs tails. A backend takes one frame and returns one answer; how frames are batched is its own business.

Shape legend: arrays are one frame's, without the batch axis.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from protos.messages import Answer, PayloadKind
from splitters.bundle import Bundle
from splitters.registry import Registry

__all__ = ["BACKENDS", "Backend", "Load", "Opener", "TailAnswer", "TailWork"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TailWork:
    """One decoded frame.

    Attributes:
        bundle_sha256: which tail.
        kind: latents, or the model's own input as a picture.
        arrays: float32 latents, or one (h, w, 3) uint8 BGR picture.
        size_px: (width, height) of the source frame.
        deadline_ns: on the server's monotonic clock; None: none.
        client: whose frame it is: a token's name, or a host where there are no tokens.
    """

    bundle_sha256: str
    kind: PayloadKind
    arrays: Sequence[NDArray[Any]]
    size_px: tuple[int, int]
    deadline_ns: int | None = None
    client: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TailAnswer:
    """The answer with what it took."""

    answer: Answer
    queue_ns: int
    tail_ns: int
    batch_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """How busy a backend is: frames that wait, and recent p95 of waiting and of the tail."""

    waiting: int
    queue_ns: int
    tail_ns: int


class Backend(Protocol):
    """A place where tails run. All methods are called from the server's one event loop."""

    async def load(self, bundle: Bundle) -> None:
        """Makes a bundle's tail ready.

        Raises:
            BundleError: it cannot be loaded.
        """
        ...

    async def unload(self, bundle_sha256: str) -> None:
        """Forgets a tail; unknown hashes are ignored."""
        ...

    async def run(self, work: TailWork) -> TailAnswer:
        """Answers one frame.

        Raises:
            OverloadedError: it cannot be answered before its deadline, or too many wait.
            ModelError: the tail failed on it.
        """
        ...

    def load_now(self) -> Load:
        """How busy it is."""
        ...

    async def close(self) -> None:
        """Ends; frames still waiting are refused."""
        ...


Opener = Callable[..., Awaitable[Backend]]
"""Called with the server's configuration and, by name, ``clock`` (monotonic ns) and ``on_death``, to be called with the error
should the backend die; on the event loop, before any bundle is loaded. Gives a backend that is ready for `Backend.load`."""

BACKENDS: Registry[Opener] = Registry(
    "headtail.backends",
    "backend",
    {"embedded": "edge_server.backends.embedded:open_backend", "ray": "edge_server.backends.ray.backend:open_backend"},
)
