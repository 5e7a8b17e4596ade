"""The ``splitters`` command: cut, profile, train, evaluate, calibrate, adapt, export, fetch, inspect."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

from protos.errors import ConfigError, StorageError
from protos.version import package_version
from splitters.commands.common.failures import as_known

VERBS = {
    "profile": "what every candidate cut of a model would cost",
    "cut": "divide a model and write a bundle",
    "train": "train a slimmable bottleneck for a cut",
    "evaluate": "accuracy against real payload bytes, beside image or video codecs",
    "calibrate": "fit a bundle's prefilter to the scene a fixed camera sees",
    "adapt": "fit a bundle's codec to one site's camera, unlabelled",
    "export": "write a default bundle, or a trained run, to a directory",
    "fetch": "bring the weights of a published model to this machine",
    "inspect": "show what a bundle holds and verify it",
}

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

EPILOG = """\
exit codes: 0 done; 2 wrong argument or missing extra; 3 no input found; 4 bundle unreadable; 11 model cannot be
loaded, cut or run; 12 nothing can be written there, or standard output was
closed; 130 and 143 interrupted; 1 our own fault (the log says more).
"""


def build_parser(verbs: Sequence[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """The parser, with the sub-commands of ``verbs``."""
    parser = argparse.ArgumentParser(
        prog="splitters",
        description="Cut vision models into a head for the device and a tail for the edge.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    parser.add_argument("--verbose", action="store_true", help="log what is being done")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in verbs:
        # Each verb's module is imported only when it is used: `splitters inspect` needs no torch.
        import_module(f"splitters.commands.{verb}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = [verb for verb in VERBS if find_spec(f"splitters.commands.{verb}") is not None]
    named = [word for word in arguments if word in known]
    args = build_parser(named[:1] or known).parse_args(arguments)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for library in ("torch", "onnxscript", "onnx_ir"):
        logging.getLogger(library).setLevel(logging.WARNING)  # at INFO they print pages of graphs
    with _Interrupts() as interrupts:
        try:
            code: int = args.run(args)
            sys.stdout.flush()
        except ModuleNotFoundError as error:
            missing = ConfigError(f"the package {error.name!r} is not installed; run: pip install 'headtail[server,train,zoo]'")
            print(f"splitters {args.verb}: {missing.message}", file=sys.stderr)
            return missing.exit_code
        except BrokenPipeError:  # the reader of our output has closed it; without this the interpreter would complain at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return StorageError.exit_code
        except (Exception, KeyboardInterrupt) as error:
            if interrupts.number or isinstance(error, KeyboardInterrupt):  # whatever a library makes of it, it is one
                return 128 + (interrupts.number or signal.SIGINT)
            failure = as_known(error)
            if failure is None:
                raise
            print(f"splitters {args.verb}: {failure.message}", file=sys.stderr)
            return failure.exit_code
    return code


class _Interrupts:
    """Turns SIGINT and SIGTERM into ``KeyboardInterrupt``, so that whatever is half written is removed, and remembers them."""

    def __init__(self) -> None:
        self.number = 0
        self._before: list[Any] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = [signal.signal(number, self._take) for number in _SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(_SIGNALS, self._before, strict=False):
            signal.signal(number, handler)

    def _take(self, number: int, _frame: object) -> None:
        self.number = number
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
