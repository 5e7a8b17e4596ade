"""The prefilter's decision: stop a frame that holds nothing of interest, keep the promised recall, and watch it.

The bundle says what a threshold promises (a calibrated recall, one-sided 95 % bound). One in a hundred of the stopped
frames is sent anyway: what the server finds there is a miss. Where misses show that the bound does not hold on this
scene, the threshold loosens. After Matsubara & Levorato (2020, arXiv 2007.15818), whose filter promises nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

from protos.errors import BundleError, ConfigError
from protos.messages import Answer
from protos.schema import read_json
from splitters.bundle import Bundle
from splitters.tasks.base import task_of

log = logging.getLogger(__name__)

SURE = 0.5  # where the bundle does not say
_CONFIDENCE = 0.95
_LOOSEN = 0.6  # of the threshold, at most at once
_BELOW = 0.98  # of the lowest score that was missed


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What ``device/prefilter.json`` says of the classes and the recall in force.

    Attributes:
        interest: names of the classes.
        class_ids: of the same, as the tail reports them.
        columns: of the same, in the prefilter's output.
        threshold: frames with a lower score are stopped.
        recall: the lower bound promised; 0: none for these classes.
        width: scores that the prefilter gives at least, one a class.
        sure: from this score on a box of interest in the server's answer to a probe counts as missed.
    """

    interest: tuple[str, ...]
    class_ids: frozenset[int]
    columns: tuple[int, ...]
    threshold: float
    recall: float
    sure: float = SURE
    width: int = 0


def read_promise(
    bundle: Bundle, *, interest: Sequence[str] = (), recall: float | None = None, insist: bool = False
) -> Promise | None:
    """The promise for these classes and this recall.

    Every set of classes that the bundle was calibrated for has thresholds of its own: each class, and groups such as ``vehicle``.

    Args:
        bundle: whose manifest names a prefilter; its promise lies beside it.
        interest: names of classes and groups; empty: those the bundle was exported for.
        recall: asked for; None: the bundle's own.
        insist: filter for classes without a promise, too.

    Returns:
        None where the bundle has no prefilter, or has no promise for these classes and nobody insists: nothing is to be filtered.

    Raises:
        ConfigError: a class the prefilter does not know, or a recall it has no threshold for.
        BundleError: the promise is unreadable.
    """
    graph = bundle.manifest.head.prefilter
    if graph is None:
        return None
    path = graph.removesuffix(".onnx") + ".json"
    try:
        spec = read_json(bundle.read_part(path), dict[str, Any], what=path)
        ids = [int(i) for i in spec["category_ids"]]
        names = {bundle.manifest.labels.get(i, str(i)): (column, i) for column, i in enumerate(ids)}
        own = tuple(str(n) for n in spec["interest"])
        groups = {str(g["name"]): tuple(str(n) for n in g["interest"]) for g in spec.get("calibrated", ()) if g.get("name")}
        wanted = _expanded(tuple(interest) or own, names, groups, bundle.manifest.name)
        fitting = [g for g in (spec, *spec.get("calibrated", ())) if set(g["interest"]) == set(wanted)]
        chosen = _for_recall(fitting[0] if fitting else spec, recall)
        threshold, bound = float(chosen["threshold"]), float(chosen["recall_promised"]) if fitting else 0.0
        sure = float(spec.get("sure", SURE))
        known = ", ".join("+".join(map(str, g["interest"])) for g in (spec, *spec.get("calibrated", ())))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BundleError(f"the prefilter's promise in bundle {bundle.manifest.name!r} cannot be read: {error}") from error
    if not fitting:
        told = f"the prefilter was not calibrated for {', '.join(wanted)} (it was for {known})"
        if not insist:
            log.warning("%s: it promises nothing, so no frame is filtered; --prefilter on filters all the same", told)
            return None
        log.warning("%s: frames that hold them may be stopped", told)
    return Promise(
        interest=wanted, class_ids=frozenset(names[n][1] for n in wanted), columns=tuple(names[n][0] for n in wanted),
        threshold=threshold, recall=bound, sure=sure, width=len(ids),
    )  # fmt: skip


def _expanded(
    interest: Sequence[str], names: Mapping[str, object], groups: Mapping[str, Sequence[str]], model: str
) -> tuple[str, ...]:
    """Class names, groups replaced by their classes.

    Raises:
        ConfigError: a name is neither.
    """
    found: dict[str, None] = {}
    for name in interest:
        if name not in names and name not in groups:
            more = f", and the groups {', '.join(groups)}" if groups else ""
            raise ConfigError(f"the prefilter of {model!r} knows {', '.join(names)}{more}; {name!r} is not among them")
        found |= dict.fromkeys([name] if name in names else groups[name])
    return tuple(found)


def _for_recall(spec: dict[str, object], recall: float | None) -> dict[str, float]:
    rows = [r for r in (spec, *spec.get("recalls", ())) if isinstance(r, dict)]  # type: ignore[misc]
    if recall is None:
        return rows[0]
    fitting = sorted((r for r in rows if r["recall_asked"] >= recall), key=lambda r: r["recall_asked"])
    if not fitting:
        known = ", ".join(f"{r['recall_asked']:g}" for r in rows)
        raise ConfigError(f"--recall {recall:g} is more than this bundle was calibrated for; it has {known}")
    return fitting[0]


def open_interest(bundle: Bundle, *, interest: Sequence[str], recall: float | None, insist: bool) -> InterestGate | None:
    """The prefilter's gate for these classes; arguments, ``None`` and errors as with ``read_promise``."""
    promise = read_promise(bundle, interest=interest, recall=recall, insist=insist)
    if promise is None:
        return None
    log.info("prefilter for %s: threshold %.3f, recall >= %.3f", ", ".join(promise.interest), promise.threshold, promise.recall)
    return InterestGate(promise)


class InterestGate:
    """Stops frames, and watches what it missed. Pure.

    Args:
        promise: from the bundle.
        probe_every: one in this many of the stopped frames is sent anyway; 0: none.
    """

    def __init__(self, promise: Promise, *, probe_every: int = 100) -> None:
        self.promise = promise
        self.threshold = promise.threshold
        self.stopped = 0
        self.loosened = 0
        self._probe_every = probe_every
        self._probes: dict[int, float] = {}
        self._missed_scores: list[float] = []
        self._probed = self._missed = self._passed_hits = 0

    def score(self, scores: Sequence[float]) -> float:
        """The score of interest among the prefilter's outputs: the highest of the chosen columns."""
        return max(scores[c] for c in self.promise.columns)

    def stops(self, index: int, score: float) -> bool:
        """Whether frame ``index`` ends here."""
        if score >= self.threshold:
            return False
        self.stopped += 1
        if self._probe_every and self.stopped % self._probe_every == 0:
            self._probes[index] = score
            return False
        return True

    def learn(self, index: int, answer: Answer | None) -> bool:
        """Takes the server's answer to a frame that passed; True when the threshold had to loosen."""
        seen = task_of(answer).classes(answer, score_min=self.promise.sure) if answer is not None else ()
        hit = any(class_id in self.promise.class_ids for class_id in seen)
        if index not in self._probes:
            self._passed_hits += hit
            return False
        score = self._probes.pop(index)
        self._probed += 1
        self._missed += hit
        if not hit:
            return False
        self._missed_scores.append(score)
        if not self._broken():
            return False
        # Just below what was missed: a larger step would send what the scene's ground scores, too.
        self.threshold = max(_LOOSEN * self.threshold, _BELOW * min(self._missed_scores))
        self.loosened += 1
        self._probed = self._missed = self._passed_hits = 0
        self._missed_scores.clear()
        return True

    @property
    def live_recall(self) -> float | None:
        """Share of the frames of interest that passed, estimated from the probes; None before the first."""
        if not self._probed:
            return None
        missed = self._missed * self._probe_every
        return self._passed_hits / (self._passed_hits + missed) if self._passed_hits + missed else None

    def _broken(self) -> bool:
        """Whether the misses among the probes are unlikely under the promise.

        Of the stopped frames, at most (1 - recall) / recall x the hits that passed may hold something; each probe finds
        such a frame with that share. One-sided test at 5 %.
        """
        if self.promise.recall <= 0:
            return False
        allowed = (1 - self.promise.recall) / self.promise.recall * self._passed_hits
        share = min(1.0, allowed / max(1, self._probed * self._probe_every))
        fewer = sum(comb(self._probed, k) * share**k * (1 - share) ** (self._probed - k) for k in range(self._missed))
        return 1 - fewer < 1 - _CONFIDENCE
