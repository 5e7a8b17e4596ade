"""How a path loses packets, measured from their fates, and how much parity that asks for.

Losses are taken for those of a Gilbert channel (Gilbert 1960): good and bad periods, everything lost in a bad one. Its two
numbers, the share lost and the mean length of a run of losses, are counted over the newest packets. What a frame needs then is
exact: the chance that more than r of k + r packets in a row are lost is a walk over the two states.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from itertools import islice, pairwise
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from protos.datagrams.parity import MAX_DATA
from protos.datagrams.pieces import pieces_of

GOAL, LEAST_GOAL = 0.995, 0.9
"""That a message arrives: what its parity is for, and what it is for where the link has no room for so much."""
PIECE_BYTES = 120
"""Of each packet: UDP, IP, QUIC and the piece's own fields."""

_NEWEST = 300
# Of the newest so many packets, beside what is believed of them all with the weight of so many: the worst is believed, so a path
# that becomes worse is known sooner than one that becomes better.
_VIEWS = ((_NEWEST, 40), (40, 12), (12, 6))
_PRIOR = 0.025  # of packets, lost, before anything is known
_LATELY = 50
_CAUTION = 0.84  # standard deviations: the share is less than what is said, four times in five
_MAX_EXTRA = 24
_MOST_LOST = 0.95
_FINE = 0.1  # a share from which on steps of .02 are fine enough
_BURSTY = 1.2  # standard deviations: more losses behind losses than chance alone makes are bursts


class Losses:
    """The fates of the newest packets, by number."""

    __slots__ = ("_fates", "_found")

    def __init__(self) -> None:
        self._fates: OrderedDict[int, bool] = OrderedDict()  # number to whether it was lost
        self._found: tuple[float, float] | None = None

    def add(self, number: int, *, lost: bool) -> None:
        """Packet ``number`` was lost, or arrived."""
        self._fates[number] = lost
        while len(self._fates) > _NEWEST:
            self._fates.popitem(last=False)
        self._found = None

    @property
    def counted(self) -> int:
        """Packets whose fates are counted."""
        return len(self._fates)

    @property
    def seen(self) -> float:
        """The share lost of those counted."""
        return sum(self._fates.values()) / len(self._fates) if self._fates else 0.0

    @property
    def lately(self) -> float:
        """The share lost of the newest fifty."""
        newest = list(islice(reversed(self._fates.values()), _LATELY))
        return sum(newest) / len(newest) if newest else 0.0

    def channel(self) -> tuple[float, float]:
        """The share lost, as a careful sender believes it, and the mean run of losses in packets, at least 1."""
        if self._found is None:
            self._found = self._count()
        return self._found

    def _count(self) -> tuple[float, float]:
        numbers = sorted(self._fates)
        fates = [self._fates[number] for number in numbers]
        usual, worst = _PRIOR, 0.0
        for newest, weight in _VIEWS:
            seen = fates[-newest:]
            n = len(seen) + weight
            share = (sum(seen) + usual * weight) / n
            usual = share if newest == _NEWEST else usual
            worst = max(worst, share + _CAUTION * sqrt(share * (1 - share) / n))
        return min(_MOST_LOST, worst), self._run(numbers)

    def _run(self, numbers: list[int]) -> float:
        """The mean run, from what became of the packets right behind lost ones: of bare acknowledgements it is not known."""
        fates, share = self._fates, self.seen
        behind = [fates[after] for number, after in pairwise(numbers) if after == number + 1 and fates[number]]
        n, lost = len(behind), sum(behind)
        if lost <= n * share + _BURSTY * sqrt(n * share * (1 - share)):
            return 1.0
        return (n + 1) / (n - lost + 0.5)


def extra_for(count: int, channel: tuple[float, float], goal: float) -> int:
    """Fewest pieces of parity beside ``count`` of data with which the whole arrives with at least the chance ``goal``.

    Args:
        count: pieces of data, at least 1.
        channel: from `Losses.channel`.
        goal: 0..1.
    """
    return Redundancy.of(channel).parity(count, 1.0, goal=goal)


class Redundancy:
    """What a path's losses ask for. The lane sends by it, and the controller prices choices by it.

    Args:
        share: of packets lost.
        run: mean run of losses.
    """

    __slots__ = ("_arrives", "_by_count", "run", "share")

    def __init__(self, share: float, run: float) -> None:
        self.share, self.run = share, run
        self._arrives = _arrives(share, run)
        self._by_count: dict[int, tuple[list[float], int, int]] = {}

    @staticmethod
    def of(channel: tuple[float, float]) -> Redundancy:
        """For what `Losses.channel` says, rounded: there are few."""
        share, run = channel
        return _redundancy(max(0.005, round(share, 2) if share < _FINE else round(share * 50) / 50), round(run * 4) / 4)

    def _known(self, count: int) -> tuple[list[float], int, int]:
        """The chances that ``count`` pieces arrive whole, by the parity beside them; what the two goals ask for."""
        found = self._by_count.get(count)
        if found is None:
            chances = [float(self._arrives[count + extra, extra]) for extra in range(_MAX_EXTRA + 1)]
            found = self._by_count[count] = chances, _first(chances, GOAL), _first(chances, LEAST_GOAL)
        return found

    def chance(self, count: int, extra: int) -> float:
        """That ``count`` pieces arrive whole with so many of parity."""
        return self._known(count)[0][extra]

    def parity(self, count: int, size_bytes: float, most_bytes: float = inf, goal: float = GOAL) -> int:
        """Pieces of parity beside ``count`` of data of that size: as many as the goal asks for, and no more than there is room for.

        Args:
            count: pieces of data.
            size_bytes: of a piece on the wire.
            most_bytes: that the message should cost there; the least goal is kept all the same.
            goal: that the message arrives.
        """
        chances, wanted, least = self._known(count)
        if goal != GOAL:
            wanted = _first(chances, goal)
        if (count + wanted) * size_bytes <= most_bytes:
            return wanted
        return max(int(most_bytes / size_bytes) - count, min(wanted, least))

    def cost(self, n_bytes: float, most_bytes: float = inf) -> tuple[float, float]:
        """Of a message: its bytes on the wire, and the chance that it arrives."""
        count = pieces_of(int(n_bytes))
        if count > MAX_DATA:  # it goes by the stream
            return n_bytes, 1.0
        size_bytes = n_bytes / count + PIECE_BYTES
        extra = self.parity(count, size_bytes, most_bytes)
        return (count + extra) * size_bytes, self.chance(count, extra)


_redundancy = lru_cache(maxsize=256)(Redundancy)


def _first(chances: list[float], goal: float) -> int:
    for extra, p in enumerate(chances):
        if p >= goal:
            return extra
    return _MAX_EXTRA


def _arrives(share: float, run: float) -> NDArray[np.float64]:
    """That at most r of n packets in a row are lost, (n, r), n up to the most that a message can be."""
    leave_bad = 1 / run if run > 1 else 1 - share
    enter_bad = min(1.0, share * leave_bad / (1 - share)) if run > 1 else share
    good, bad = np.zeros(_MAX_EXTRA + 2), np.zeros(_MAX_EXTRA + 2)  # by how many were lost, of more than matter all in the last
    good[0], bad[1] = 1 - share, share
    found = np.ones((MAX_DATA + _MAX_EXTRA + 1, _MAX_EXTRA + 1))
    for n in range(1, len(found)):
        found[n] = np.cumsum(good[:-1] + bad[:-1])
        entered = good * enter_bad + bad * (1 - leave_bad)
        good = good * (1 - enter_bad) + bad * leave_bad
        bad[1:] = entered[:-1]
        bad[0] = 0.0
    return found
