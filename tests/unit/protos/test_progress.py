"""Progress where nobody watches a terminal: flushed lines, not too many, the last one always."""

from __future__ import annotations

import io

from splitters.commands.common.progress import Progress


class Flushed(io.StringIO):
    """Remembers what had been flushed."""

    seen = ""

    def flush(self) -> None:
        super().flush()
        self.seen = self.getvalue()


def test_lines_are_flushed_now_and_then_and_at_the_end() -> None:
    stream, now_s = Flushed(), [0.0]
    with Progress("measuring", stream=stream, clock_s=lambda: now_s[0], every_s=5) as show:
        for done in range(1, 11):
            now_s[0] += 1.0
            show(done, 10, f"point {done}")
    assert stream.seen.splitlines() == [
        "measuring: 1 of 10  point 1", "measuring: 6 of 10  point 6", "measuring: 10 of 10  point 10",
    ]  # fmt: skip


def test_work_that_breaks_off_says_how_far_it_came() -> None:
    stream = Flushed()
    with Progress("decoding", stream=stream, clock_s=lambda: 0.0) as show:
        show(1, 10)
        show(2, 10)
    assert stream.seen.splitlines()[-1] == "decoding: 2 of 10"


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("measuring [x]", stream=stream) as show:
        show(3, 10, "point [bold]")
        show(10, 10, "done")
    assert "measuring [x]" in stream.getvalue()
    assert "10/10" in stream.getvalue()
