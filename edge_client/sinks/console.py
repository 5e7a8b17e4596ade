"""The answer to each picture, as a line for people."""

from __future__ import annotations

from typing import TextIO

from edge_client.frames import FrameReport
from edge_client.observe.told import line_of
from edge_client.sinks.base import Labels
from protos.errors import StorageError


class PictureLines:
    """``cat.jpg: tabby cat 0.83``, a line a picture."""

    def __init__(self, stream: TextIO, labels: Labels) -> None:
        self._stream = stream
        self._labels = labels

    def take(self, report: FrameReport) -> None:
        """See ``Sink``.

        Raises:
            StorageError: nobody reads it any more.
        """
        try:
            print(line_of(report, self._labels()), file=self._stream, flush=True)
        except OSError as error:
            raise StorageError(f"standard output takes nothing any more: {error.strerror}") from error

    def close(self) -> None:
        """See ``Sink``."""
