"""Where the process ``edge-server`` begins: a reload that is asked for while Python still imports must not end it."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Runs the command line; returns the exit code."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from edge_server import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
