"""A sink: a line of text for each frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from edge_client.frames import FrameReport
from edge_client.observe.told import in_words


class Tally:
    def __init__(self, where: str, labels: Callable[[], Mapping[int, str]]) -> None:
        self._file, self._labels = Path(where).open("w", encoding="utf-8"), labels  # noqa: SIM115 - closed by close()

    def take(self, report: FrameReport) -> None:
        self._file.write(f"{report.frame.index} {report.outcome.value} {in_words(report.answer, self._labels())}\n")

    def close(self) -> None:
        self._file.close()
