"""What live and file sources do differently: handed to the runner, and asked where the two differ."""

from __future__ import annotations

from typing import Protocol

from edge_client.pipeline.flights import Flight
from protos.errors import HeadtailError


class Strategy(Protocol):
    """Takes frames from the source to the server.

    Attributes:
        local_rescue: whether the local model may answer a frame that is in flight.
        failure: what the run ends with after every frame was settled; None: nothing went wrong.
    """

    local_rescue: bool
    failure: HeadtailError | None

    async def main(self) -> None:
        """Takes frames until the source ends and every one is settled."""

    def waiting(self) -> list[Flight]:
        """Frames it holds that are not in flight."""
        ...

    def watched(self) -> list[Flight]:
        """Those of them whose deadlines hold while they wait."""
        ...

    def wants_fallback(self, flight: Flight, now_ns: int) -> bool:
        """Whether the local model should answer a frame whose answer may still come; asked once, when it is due."""
        ...

    def on_lost(self, flights: list[Flight]) -> None:
        """No answer will come for these: the stream broke, the server refused them, or they were not sent."""

    def on_down(self) -> None:
        """The session is gone."""

    def on_result(self) -> None:
        """The server answered a frame, whatever it said."""
