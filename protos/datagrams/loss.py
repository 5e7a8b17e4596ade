"""How a path loses packets, measured from their fates, and how much parity that asks for.

Losses are taken for those of a Gilbert channel (Gilbert 1960): good and bad periods, everything lost in a bad one. Its two
numbers, the share lost and the mean length of a run of losses, are counted over the newest packets. What a frame needs then is
exact: the chance that more than r of k + r packets in a row are lost is a walk over the two states.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from itertools import islice, pairwise
from math import sqrt

_NEWEST = 300
# Of the newest so many packets, beside what is believed of them all with the weight of so many: the worst is believed, so a path
# that becomes worse is known sooner than one that becomes better.
_VIEWS = ((_NEWEST, 40), (40, 12), (12, 6))
_PRIOR = 0.025  # of packets, lost, before anything is known
_LATELY = 50
_CAUTION = 0.84  # standard deviations: the share is less than what is said, four times in five
_MAX_EXTRA = 24
_MOST_LOST = 0.95
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
    share, run = channel
    return _extra_for(count, round(share, 2) or 0.005, round(run, 1), goal)


@lru_cache(maxsize=4096)
def _extra_for(count: int, share: float, run: float, goal: float) -> int:
    for extra in range(_MAX_EXTRA):
        if chance(count + extra, extra, share, run) >= goal:
            return extra
    return _MAX_EXTRA


def chance(packets: int, bearable: int, share: float, run: float) -> float:
    """That at most ``bearable`` of this many packets in a row are lost."""
    leave_bad = 1 / run if run > 1 else 1 - share
    enter_bad = min(1.0, share * leave_bad / (1 - share)) if run > 1 else share
    good, bad = [1 - share] + [0.0] * packets, [0.0, share] + [0.0] * (packets - 1)
    for _ in range(packets - 1):
        next_good = [g * (1 - enter_bad) + b * leave_bad for g, b in zip(good, bad, strict=True)]
        next_bad = [0.0, *(g * enter_bad + b * (1 - leave_bad) for g, b in zip(good[:-1], bad[:-1], strict=True))]
        good, bad = next_good, next_bad
    return sum(good[: bearable + 1]) + sum(bad[: bearable + 1])
