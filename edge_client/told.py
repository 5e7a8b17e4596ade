"""Answers in words: for the console, the status line, the summary and labels in pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from edge_client.frames import FrameReport
from protos.messages import Answer, Classification, Detection
from protos.text import printable

_LABEL_CHARS = 40
_CLASSES = 6  # named of one frame


def label_of(class_id: int, labels: Mapping[int, str]) -> str:
    """A class's name, or its number where it has none."""
    return printable(labels.get(class_id) or f"class {class_id}", max_chars=_LABEL_CHARS)


def in_words(answer: Answer | None, labels: Mapping[int, str]) -> str:
    """What a frame shows, in a few words; empty where nothing is known of it."""
    if isinstance(answer, Classification):
        return ", ".join(f"{label_of(s.class_id, labels)} {s.score:.2f}" for s in answer.top[:1])
    if isinstance(answer, Detection):
        counts = Counter(label_of(box.class_id, labels) for box in answer.boxes).most_common()
        more = f" and {len(counts) - _CLASSES} more kinds" if len(counts) > _CLASSES else ""
        return ", ".join(f"{name} {n}" for name, n in counts[:_CLASSES]) + more if counts else "nothing"
    return ""


def line_of(report: FrameReport, labels: Mapping[int, str]) -> str:
    """The line that the console shows of a picture."""
    words = in_words(report.answer, labels)
    if isinstance(report.answer, Detection) and report.answer.boxes:
        best = report.answer.boxes[:_CLASSES]
        words += "  (" + ", ".join(f"{label_of(b.class_id, labels)} {b.score:.2f}" for b in best) + ")"
    name = printable(report.frame.source) or f"frame {report.frame.index}"
    return f"{name}: {words or report.outcome.value + (f' ({report.reason})' if report.reason else '')}"


class AnswerCounts:
    """How often each class was seen in a run: boxes, and the frames that had one."""

    def __init__(self) -> None:
        self.objects: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()

    def take(self, answer: Answer | None, labels: Mapping[int, str]) -> None:
        """One frame's answer; of a classification, its first class."""
        if isinstance(answer, Detection):
            seen = Counter(label_of(box.class_id, labels) for box in answer.boxes)
        elif isinstance(answer, Classification):
            seen = Counter(label_of(score.class_id, labels) for score in answer.top[:1])
        else:
            return
        self.objects.update(seen)
        self.frames.update(seen.keys())

    def as_json(self) -> dict[str, dict[str, int]]:
        """``{label: {objects, frames}}``, the most frequent first."""
        return {name: {"objects": n, "frames": self.frames[name]} for name, n in self.objects.most_common()}

    def as_text(self, columns: int = 10) -> str:
        """``person 120 in 45 frames, car 3 in 3 frames``."""
        most = self.objects.most_common(columns)
        words = [f"{name} {n} in {self.frames[name]} {'frame' if self.frames[name] == 1 else 'frames'}" for name, n in most]
        more = len(self.objects) - len(most)
        return ", ".join(words) + (f" and {more} more classes" if more else "")
