"""Messages that wait on disk until somebody has taken them: they outlive the network, the broker and this process.

An SQLite file with a row a message. What is taken from it is removed only once it was delivered, so that a message may be
delivered twice and none is lost while there is room; each carries an id by which its taker knows it again.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from protos.errors import StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message; ``row`` 0: not queued yet. ``topic`` and ``retain`` are MQTT's."""

    body: bytes
    topic: str = ""
    retain: bool = False
    row: int = 0


class DiskQueue:
    """First in, first out; bounded. Belongs to one thread.

    Args:
        path: the file; ``:memory:`` for none.
        limit: messages kept; beyond it the oldest are given up.

    Raises:
        StorageError: it cannot be opened or written.
    """

    def __init__(self, path: Path | str, *, limit: int) -> None:
        self.lost = 0
        self._limit = limit
        try:
            if isinstance(path, Path):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            for word in ("journal_mode=WAL", "synchronous=NORMAL"):
                self._db.execute(f"PRAGMA {word}")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS waiting (row INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT, retain INTEGER, body BLOB)"
            )
            (self._count,) = self._db.execute("SELECT COUNT(*) FROM waiting").fetchone()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(f"the queue of events {path} cannot be opened: {error}") from error

    def __len__(self) -> int:
        return int(self._count)

    def add(self, messages: list[Message]) -> None:
        """Queues messages, all or none."""
        rows = [(m.topic, int(m.retain), m.body) for m in messages]
        try:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO waiting (topic, retain, body) VALUES (?, ?, ?)", rows)
            over = self._count + len(rows) - self._limit
            if over > 0:
                self._db.execute("DELETE FROM waiting WHERE row IN (SELECT row FROM waiting ORDER BY row LIMIT ?)", (over,))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise StorageError(f"the queue of events takes no more: {error}") from error
        self.lost += max(0, over)
        self._count = min(self._limit, self._count + len(rows))

    def oldest(self, count: int) -> list[Message]:
        """The next messages, which stay in the queue."""
        rows = self._db.execute("SELECT row, topic, retain, body FROM waiting ORDER BY row LIMIT ?", (count,)).fetchall()
        return [Message(row=row, topic=topic, retain=bool(retain), body=body) for row, topic, retain, body in rows]

    def delivered(self, messages: list[Message]) -> None:
        """Removes messages."""
        self._db.execute("BEGIN")
        self._db.executemany("DELETE FROM waiting WHERE row = ?", [(m.row,) for m in messages])
        self._db.execute("COMMIT")
        self._count -= len(messages)

    def close(self) -> None:
        """Leaves what waits for the next start."""
        self._db.close()
