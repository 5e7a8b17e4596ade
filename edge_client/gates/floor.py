"""From which score on a detector's box counts.

Average precision is computed over all boxes, so a detector reports even those it hardly believes in. People, trackers and
alarms want the boxes that are probably right: those from the score at which F1 is highest, which the bundle names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from protos.errors import ConfigError
from protos.messages import Answer, Detection
from splitters.bundle import Bundle

DEFAULT = 0.25
_RAW = 0.1  # a bundle whose own threshold is lower has it for the judging of average precision


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreFloor:
    """What ``--score-min`` asks for.

    Attributes:
        every: for classes without one of their own; None: as the bundle says.
        classes: by label.
    """

    every: float | None = None
    classes: Mapping[str, float] = field(default_factory=dict)

    def cut(self, answer: Answer | None, bundle: Bundle) -> Answer | None:
        """The answer without the boxes that do not count."""
        if not isinstance(answer, Detection) or not answer.boxes:
            return answer
        every = self.every if self.every is not None else bundle_floor(bundle)
        labels = bundle.manifest.labels
        kept = tuple(b for b in answer.boxes if b.score >= self.classes.get(labels.get(b.class_id, str(b.class_id)), every))
        return answer if len(kept) == len(answer.boxes) else Detection(boxes=kept)

    def check(self, bundle: Bundle) -> None:
        """Refuses classes that the bundle does not have.

        Raises:
            ConfigError: one is unknown.
        """
        known = set(bundle.manifest.labels.values()) | {str(i) for i in bundle.manifest.labels}
        for name in self.classes:
            if known and name not in known:
                raise ConfigError(f"--score-min names the class {name!r}, which {bundle.manifest.name!r} does not have")


def bundle_floor(bundle: Bundle) -> float:
    """Where the bundle balances precision and recall (``score_min``), or a usual value where it does not say."""
    said = getattr(bundle.manifest, "score_min", None)
    if said is None:
        own = bundle.manifest.postprocess.get("score_min")
        said = own if isinstance(own, int | float) and own >= _RAW else None
    return float(said) if isinstance(said, int | float) else DEFAULT


def read_floor(text: str) -> ScoreFloor:
    """Reads ``0.4``, ``person=0.6`` or ``0.4,person=0.6,car=0.5``.

    Raises:
        ConfigError: it is none of these, or a score outside 0..1.
    """
    every: float | None = None
    classes: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.rpartition("=")
        try:
            score = float(value)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 1:
            raise ConfigError(f"--score-min {item!r} is not understood; give a score 0..1, and label=score for a class")
        if equals:
            classes[name.strip()] = score
        else:
            every = score
    return ScoreFloor(every=every, classes=classes)
