"""``edge-client doctor``."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_client.doctor.checks import examine
from edge_client.observe import console as consoles
from protos.errors import HeadtailError
from protos.logs import set_up

_DESCRIPTION = """\
Looks at what edge-client needs on this device: software, clock, cache, camera, server, encryption, and how long the model's
choices take here. It fetches the model, as a first start would. Exit code 0: nothing is wrong; else the first failure's."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="edge-client doctor", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--camera", metavar="SOURCE", help="see edge-client --help; without it no camera is tried")
    add("--server", metavar="HOST:PORT", help="the server (default 127.0.0.1:50051)")
    add("--model", metavar="NAME", help="one of the server's models (default: its first)")
    add("--deadline-ms", type=float, metavar="MS", help="what the device's times are held against (default 500)")
    add("--threads", type=int, metavar="N", help="threads of the head (default 1)")
    add("--tls", action="store_true", help="encrypt with the system's certificate authorities")
    add("--tls-ca", metavar="FILE", help="encrypt, trusting this certificate authority (PEM)")
    add("--tls-cert", metavar="FILE", help="this client's certificate, for mutual TLS (PEM)")
    add("--tls-key", metavar="FILE", help="its key (PEM)")
    add("--config", metavar="FILE.toml", help="a client's settings; the command line wins")
    add("--json", action="store_true", help="the findings as one JSON object on the last line")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the checks and returns the exit code."""
    from edge_client.config import make_config, read_settings

    set_up("error", "text", sys.stderr)
    given = vars(build_parser().parse_args(argv))
    as_json = given.pop("json", False)
    path = given.pop("config", None)
    try:
        what, from_file = read_settings(Path(path) if path else None)
        settings = {**from_file, **given}
        with_camera = "camera" in settings
        config = make_config({"camera": "synthetic:", **settings}, what=what)
        found = asyncio.run(examine(config, with_camera=with_camera))
    except HeadtailError as error:
        consoles.say(sys.stderr, f"edge-client doctor: {error.message}")
        return error.exit_code
    failures = [finding.error for finding in found if finding.error is not None]
    for finding in found:
        mark = "WRONG" if finding.error is not None else "look " if finding.advice else "ok   "
        consoles.say(sys.stdout, f"{mark} {finding.what:<11}{finding.said}")
        if finding.advice:
            consoles.say(sys.stdout, f"{'':17}{finding.advice}")
    code = failures[0].exit_code if failures else 0
    if as_json:
        lines = [{"what": f.what, "said": f.said, "wrong": f.error is not None, "advice": f.advice or None} for f in found]
        consoles.say(sys.stdout, json.dumps({"findings": lines, "exit_code": code}))
    return code
