"""What the doors and replicas of one cluster must agree on, in one place.

Doors share applications: one that changes a bundle must know whether another still uses the old tail, and of several that start
together one deploys. A replica may run where nobody has put its bundle, and when it cannot start, the reason is of use to the
door's operator and not in a log on that node. So each cluster has one `Register`: an actor that Ray keeps whoever created it is
gone. It holds no clock of anyone else's: a door tells every few seconds what it uses, and one that falls silent uses nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_server.backends.ray.imports import ray

NAME, NAMESPACE = "headtail-register", "headtail"
RENEW_S = 5.0
LEASE_S = 20.0
TURN_S = 60.0
_BACK_OFF_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)

Use = tuple[str, str]
"""An application and the hash of a bundle whose frames it answers."""
Files = Mapping[str, bytes]
"""A bundle's files by their path within it."""


class Register:
    """One a cluster; see the module.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began_s = clock()
        self._turns: dict[str, tuple[str, float]] = {}
        self._uses: dict[Use, dict[str, float]] = {}
        self._bundles: dict[str, Files] = {}
        self._failures: dict[str, dict[str, tuple[int, str]]] = {}

    # ------------------------------------------------------------ doors

    def take_turn(self, what: str, door: str) -> bool:
        """Whether it is this door's turn, for `TURN_S` from now; asked again it is prolonged."""
        holder, until_s = self._turns.get(what, (door, 0.0))
        if holder != door and self._clock() < until_s:
            return False
        self._turns[what] = (door, self._clock() + TURN_S)
        return True

    def end_turn(self, what: str, door: str) -> None:
        """The door is done; a turn that has gone to another one by now stays there."""
        if self._turns.get(what, ("", 0.0))[0] == door:
            del self._turns[what]

    def renew(self, door: str, uses: Sequence[Use]) -> list[str]:
        """A door uses these for `LEASE_S` from now.

        Returns:
            The hashes of those bundles that are not kept here, after a restart for instance.
        """
        until_s = self._clock() + LEASE_S
        for use in uses:
            self._uses.setdefault(use, {})[door] = until_s
        return sorted({sha256 for _, sha256 in uses} - set(self._bundles))

    def leave(self, use: Use, door: str, drop: bool) -> bool | None:
        """A door uses it no more.

        Args:
            use: what it used.
            door: which one.
            drop: its files are not wanted either when nobody uses it.

        Returns:
            Whether nobody does. None: that cannot be known yet, since others may not have told this register, which is new.
        """
        now_s = self._clock()
        left = {each: until_s for each, until_s in self._uses.get(use, {}).items() if each != door and until_s > now_s}
        if left:
            self._uses[use] = left
            return False
        self._uses.pop(use, None)
        if now_s - self._began_s < LEASE_S:
            return None
        if drop and all(sha256 != use[1] for _, sha256 in self._uses):
            self._bundles.pop(use[1], None)
        self._failures.pop(use[0], None)
        return True

    # ------------------------------------------------------------ bundles

    def keep(self, sha256: str, files: Files) -> None:
        """Keeps a bundle's files for nodes that do not have them."""
        self._bundles[sha256] = files

    def bundle(self, sha256: str) -> Files | None:
        """A bundle's files; None: no door has handed them in."""
        return self._bundles.get(sha256)

    # ------------------------------------------------------------ replicas

    def failed(self, app: str, node: str, reason: str) -> float:
        """A replica cannot start on a node.

        Returns:
            Seconds after which the next try on that node is due: longer from failure to failure.
        """
        count, _ = self._failures.setdefault(app, {}).get(node, (0, ""))
        self._failures[app][node] = (count + 1, reason)
        return _BACK_OFF_S[min(count, len(_BACK_OFF_S) - 1)]

    def started(self, app: str, node: str) -> None:
        """A replica has started on a node."""
        self._failures.get(app, {}).pop(node, None)

    def failures(self, app: str) -> dict[str, tuple[int, str]]:
        """By node: how often in a row replicas could not start there, and why the last one could not."""
        return self._failures.get(app, {})


def open_register() -> Any:
    """The cluster's register, made by whoever asks first; this process has joined the cluster."""
    kind = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=3)(Register)
    return kind.options(name=NAME, namespace=NAMESPACE, get_if_exists=True, lifetime="detached").remote()
