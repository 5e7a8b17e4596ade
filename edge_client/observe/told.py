"""Answers in words: for the console, the status line, the summary and labels in pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from edge_client.frames import FrameReport
from protos.messages import Answer
from protos.text import printable
from splitters.tasks.base import task_of
from splitters.tasks.canvas import label_of


def line_of(report: FrameReport, labels: Mapping[int, str]) -> str:
    """The line that the console shows of a picture."""
    words = "" if report.answer is None else task_of(report.answer).in_words(report.answer, labels, more=True)
    name = printable(report.frame.source) or f"frame {report.frame.index}"
    return f"{name}: {words or report.outcome.value + (f' ({report.reason})' if report.reason else '')}"


def in_words(answer: Answer | None, labels: Mapping[int, str]) -> str:
    """What a frame shows, in a few words; empty where nothing is known of it."""
    return "" if answer is None else task_of(answer).in_words(answer, labels)


class AnswerCounts:
    """How often each class was seen in a run: boxes, and the frames that had one."""

    def __init__(self) -> None:
        self.objects: Counter[str] = Counter()
        self.frames: Counter[str] = Counter()

    def take(self, answer: Answer | None, labels: Mapping[int, str]) -> None:
        """One frame's answer; of a classification, its first class."""
        if answer is None:
            return
        seen: Counter[str] = Counter()
        for class_id, count in task_of(answer).classes(answer).items():
            seen[label_of(class_id, labels)] += count
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
