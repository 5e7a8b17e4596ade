"""Logs, for both sides: lines for people, or JSON objects for machines that collect them.

A JSON line has ``time`` (RFC 3339, UTC), ``level``, ``logger`` and ``message``, whatever was passed as ``extra``, and ``exception``
with its traceback where there is one.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from protos.text import ascii_escaped, printable

FORMATS: Final = ("text", "json")
_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return ascii_escaped(json.dumps(line, default=str, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """A line a record; a traceback's lines are set in, so that no text of others in it can pass for a record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """See logging."""
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """See logging."""
        return "\n".join("  " + printable(line) for line in super().formatException(ei).split("\n"))


def set_up(level: str, form: str, stream: TextIO, *, before: str = "") -> None:
    """Sends all logs to ``stream``.

    Args:
        level: the lowest that is shown.
        form: one of `FORMATS`.
        stream: standard error.
        before: put before each text line, to clear a status line.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(before + _TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def say(text: str, form: str, stream: TextIO, *, logger: str, extra: Mapping[str, object]) -> None:
    """The last word of a command: a plain line, or a record among the others."""
    if form == "json":
        logging.getLogger(logger).critical("%s", text, extra=dict(extra))
    else:
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.write(f"{printable(text)}\n")
            stream.flush()
