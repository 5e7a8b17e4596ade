"""``splitters fetch NAME``: bring the weights of a published model to this machine, verified."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from splitters.zoo.published import published


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declares the verb."""
    parser = subparsers.add_parser(
        "fetch",
        help="bring the weights of a published model to this machine",
        description="Downloads a published model's weights from their fixed address, or takes them from a file, and verifies their "
        "sha256. A download that stopped goes on where it stopped. `edge-server --model NAME` does the same on first use.",
    )
    parser.add_argument("name", metavar="NAME", help=", ".join(published()))
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="FILE|DIR",
        help="take a copy of these instead",
    )
    parser.add_argument("--mirror", default="", metavar="URL", help="fetch below this address instead (default: $HEADTAIL_MIRROR)")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fetches and says what came from where, under which licence."""
    from splitters.zoo.fetch import fetch
    from splitters.zoo.published import find

    wanted = find(args.name)
    path = fetch(wanted, weights=args.weights, mirror=args.mirror, progress=Progress(wanted.name), keep=args.weights is not None)
    print(f"{wanted.name}: {path}\n  licence: {wanted.licence}\n  origin:  {wanted.address}\n  sha256:  {wanted.sha256}")
    if args.json:
        print(json.dumps({"name": wanted.name, "path": str(path), "sha256": wanted.sha256, "licence": wanted.licence}))
    return 0


class Progress:
    """Says on standard error how far a download is: in place on a terminal, now and then into a log."""

    def __init__(self, name: str) -> None:
        self._name, self._told_s = name, 0.0

    def __call__(self, have: int, total: int) -> None:
        """Told after every piece."""
        terminal = sys.stderr.isatty()
        if have < total and time.monotonic() - self._told_s < (0.1 if terminal else 5.0):
            return
        self._told_s = time.monotonic()
        text = f"{self._name}: {have / 1e6:.1f} of {total / 1e6:.1f} MB"
        print(f"\r{text}" if terminal else text, end="" if terminal and have < total else "\n", file=sys.stderr, flush=True)
