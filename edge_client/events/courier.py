"""A thread that takes events to one target: first to disk, then out, again and again until they were taken."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from edge_client.events.queue import DiskQueue, Message
from protos.errors import StorageError

log = logging.getLogger(__name__)

Make = Callable[[], list[Message]]
"""Makes the messages of an event, in the courier's thread: a snapshot is compressed there."""

BATCH = 100
_ROOM = 10_000  # events in memory, for a disk that is slow
_BACK_OFF_S = (0.5, 30.0)
_END_S = 2.0


class TargetError(Exception):
    """The target did not take messages; they are tried again."""


class Target(Protocol):
    """Where messages go; everything here blocks and is called in the courier's thread only."""

    shown: str

    def send(self, messages: list[Message]) -> int:
        """Delivers some; how many of the first ones were taken, or refused for good.

        Raises:
            TargetError: none was taken now.
        """
        ...

    def close(self) -> None:
        """Goodbye."""


class Courier:
    """Takes messages without ever holding anybody up.

    Args:
        target: where to.
        open_queue: opens the queue on disk, in the courier's thread.
        back_off_s: (first, longest) wait after a failure.
    """

    def __init__(
        self, target: Target, open_queue: Callable[[], DiskQueue], *, back_off_s: tuple[float, float] = _BACK_OFF_S,
        end_s: float = _END_S,
    ) -> None:  # fmt: skip
        self.lost = 0
        self.delivered = 0
        self._target, self._open_queue = target, open_queue
        self._back_off_s, self._end_s = back_off_s, end_s
        self._random = random.Random()  # noqa: S311 - jitter
        self._given: deque[Make] = deque()
        self._wake = threading.Event()
        self._ending_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def give(self, make: Make) -> None:
        """One more event; returns at once."""
        if len(self._given) >= _ROOM:
            self.lost += 1
            return
        self._given.append(make)
        self._wake.set()

    def close(self) -> None:
        """Delivers what it can within two seconds; the rest stays on disk for the next start."""
        self._ending_s = time.monotonic() + self._end_s
        self._wake.set()
        self._thread.join(self._end_s + 5)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            queue = self._open_queue()
        except StorageError as error:
            log.error("%s; no events reach %s", error.message, self._target.shown)
            return
        try:
            self._work(queue)
        except Exception:
            log.exception("events no longer reach %s", self._target.shown)
        finally:
            self._target.close()
            if self.lost or queue.lost:
                log.warning("%d events for %s were lost: the queue was full", self.lost + queue.lost, self._target.shown)
            if len(queue):
                log.warning("%d messages for %s wait on disk for the next start", len(queue), self._target.shown)
            queue.close()

    def _work(self, queue: DiskQueue) -> None:
        wait_s, next_s, failing = self._back_off_s[0], 0.0, False
        while True:
            self._store(queue)
            ending = self._ending_s is not None
            now_s = time.monotonic()
            if len(queue) and (now_s >= next_s or (ending and not failing)):
                try:
                    self._deliver(queue)
                    if failing:
                        log.warning("%s takes events again", self._target.shown)
                    wait_s, failing = self._back_off_s[0], False
                    continue
                except TargetError as error:
                    if not failing:
                        log.warning("%s takes no events (%s); they wait on disk", self._target.shown, error)
                    failing = True
                    next_s = time.monotonic() + wait_s * self._random.uniform(0.5, 1.0)
                    wait_s = min(2 * wait_s, self._back_off_s[1])
            if ending and not self._given and (not len(queue) or time.monotonic() >= (self._ending_s or 0)):
                return
            self._wake.wait(max(0.01, min(next_s - time.monotonic(), 0.2)) if len(queue) else (0.2 if ending else None))
            self._wake.clear()

    def _store(self, queue: DiskQueue) -> None:
        while self._given:
            makes = [self._given.popleft() for _ in range(min(BATCH, len(self._given)))]
            try:
                queue.add([message for make in makes for message in make()])
            except StorageError as error:
                self.lost += len(makes)
                log.error("%s", error.message)

    def _deliver(self, queue: DiskQueue) -> None:
        messages = queue.oldest(BATCH)
        taken = self._target.send(messages)
        queue.delivered(messages[:taken])
        self.delivered += taken
