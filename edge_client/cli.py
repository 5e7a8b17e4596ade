"""``edge-client``: the whole user interface of the device."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

from edge_client.capture.masking import hide_secrets
from edge_client.interrupts import Interrupts
from edge_client.observe import console as consoles
from protos.errors import ConfigError, HeadtailError
from protos.logs import FORMATS, say, set_up
from protos.process import leave, steady_streams, was_closed
from protos.version import package_version

if TYPE_CHECKING:
    from edge_client.app import App
    from edge_client.cameras.tables import CamerasConfig
    from edge_client.config import ClientConfig
    from edge_client.console import Console, Ending

_DESCRIPTION = """\
Runs the head of a vision model on this device and sends what it says to a headtail server, which runs the tail.
The server tells which model; its device part is fetched once and cached. Every captured frame ends in exactly one
outcome: result (the server's answer), local (the device's own small model), unchanged, filtered, dropped or expired.
"""

_EPILOG = """\
examples:
  edge-client --camera 0 --server host:50051                    a webcam, answered within 500 ms or locally
  edge-client --camera photos/ --server embedded --output -     every photo in a directory, server started for you
  edge-client --camera clip.mp4 --realtime --deadline-ms 200    a file as if it were a camera
  edge-client --camera rtsp://cam/1 --save-video out.mp4        annotated video
  edge-client --camera synthetic:fps=30,size=640x480 --frames 300 --json

  edge-client doctor --camera 0 --server host:50051             what is wrong here, before anything runs

live or file: cameras, URLs, synthetic: and --realtime are live: newest frame only, a deadline (500 ms), local answers
when the network fails. Pictures, directories and files are not: every frame, no deadline, the server's answer.

exit codes: 0 done or stopped by SIGINT/SIGTERM; 1 our own fault; 2 wrong option; 3 no frames from the source, or reading it failed;
4 bundle absent or altered; 5 unknown model; 6 version mismatch; 7 no headtail server there; 8 broken protocol;
9 a limit; 10 not authorised; 11 the model failed; 12 a disk is full, or standard output closed; 130 interrupted twice.

environment: HEADTAIL_TOKEN (bearer token), HEADTAIL_WEB_TOKEN (the live page's), HEADTAIL_CACHE (default ~/.cache/headtail).
"""

_CAMERA_HELP = "device index, /dev/videoN, RTSP/HTTP URL, video file, picture, directory, or synthetic:[fps=30,size=640x480]"


class Program(Protocol):
    """What the command line runs to its end."""

    async def run(self) -> Ending:
        """Runs; every failure is in the ending."""
        ...

    def interrupt(self) -> None:
        """Ends it in order."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints show no camera's password."""

    def error(self, message: str) -> NoReturn:
        """See argparse."""
        super().error(hide_secrets(message))


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are ``ClientConfig``'s."""
    parser = _Parser(
        prog="edge-client", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    add = parser.add_argument_group("where frames come from").add_argument
    add("--camera", metavar="SOURCE", help=_CAMERA_HELP)
    add("--frigate", metavar="ADDRESS", help="no camera: answer Frigate's zmq detector at this address, e.g. tcp://127.0.0.1:5555")
    add("--camera-id", metavar="NAME", help="what results call the camera (default: the source, without a URL's path and password)")
    add("--frames", type=int, metavar="N", help="end after N captured frames (default 0: no limit)")
    add("--loop", action="store_true", help="begin a file again at its end")
    add("--realtime", action="store_true", help="play a file at its own pace and treat it as a camera: newest frame wins")
    add("--fps", type=float, metavar="F", help="the pace of --realtime (default: the file's own, 25 for pictures)")
    add(
        "--strict",
        action="store_true",
        help="a source that is cut off, damaged or partly unreadable is an error at the end (exit 3)",
    )
    add = parser.add_argument_group("where they are answered").add_argument
    add("--server", metavar="HOST:PORT", help="the server, or 'embedded' to start one as a child (default 127.0.0.1:50051)")
    add("--model", metavar="NAME", help="one of the server's models (default: its first); with embedded: a bundle or its name")
    add("--deadline-ms", type=float, metavar="MS", help="from capture to answer, 0: none (default 500 live, none for files)")
    add("--wait-for-server-s", type=float, metavar="S", help="go on without a server after so long (default 0 live, 30 for files)")
    add(
        "--max-in-flight",
        type=int,
        metavar="N",
        help="frames unanswered at a time (default 0: as many as the network is ready for)",
    )
    add("--operating-point", type=int, metavar="ID", help="always send at this operating point instead of choosing")
    add("--group", metavar="NAME", help="cameras of the same group share a link; the server divides it fairly")
    add(
        "--policy",
        metavar="NAME",
        help="who chooses what is sent in real time: a registered name or module:Class (default adaptive)",
    )
    add(
        "--transport",
        metavar="NAME",
        help="what carries the frames: grpc, quic, auto (quic where packets are lost, with the extra 'quic'), or module:Class"
        " (default auto)",
    )
    add("--threads", type=int, metavar="N", help="threads of the head on this device (default 1)")
    add("--h264-encoder", metavar="NAME", help="FFmpeg's encoder for offloaded video, auto or off (default auto: the device's own)")
    add = parser.add_argument_group("which frames need no answer").add_argument
    add(
        "--change-gate",
        choices=("on", "off", "auto"),
        help="reuse the last result where nothing moved (default: on for cameras)",
    )
    add("--prefilter", choices=("on", "off", "auto"), help="stop frames without anything of interest (default as --change-gate)")
    add("--interest", metavar="CLASSES", help="what the prefilter looks for: classes, or person, vehicle, animal (switches it on)")
    add("--recall", type=float, metavar="R", help="the prefilter's promised recall, e.g. 0.98 (default: the bundle's)")
    add("--score-min", metavar="S", help="boxes below this score do not count; 0.4 or 0.4,person=0.6 (default: the bundle's)")
    add("--track", action="store_true", help="carry the last boxes along on frames without an answer, each marked with its age")
    add = parser.add_argument_group("where answers go").add_argument
    add("--output", metavar="FILE", help="results as JSON lines, one a frame; - is standard output")
    add("--append", action="store_true", help="go on with the file of --output instead of emptying it first")
    add("--output-max-mb", type=float, metavar="MB", help="rotate --output at this size, keeping 4 older files (default 0: never)")
    add(
        "--save-video",
        metavar="PATH",
        help="write annotated frames: a .mp4 (H.264), .mkv or .avi, a .jpg for one picture, or a directory",
    )
    add("--sink", action="append", metavar="NAME[=WHERE]", help="a further place: a registered name or module:Class; repeatable")
    add(
        "--web", metavar="HOST:PORT", help="a live page for browsers, e.g. 127.0.0.1:8080; elsewhere HEADTAIL_WEB_TOKEN must be set"
    )
    add("--display", action="store_true", help="show annotated frames in a window")
    add("--json", action="store_true", help="the summary as one JSON object on the last line of standard output")
    add = parser.add_argument_group("encryption (the token stands in HEADTAIL_TOKEN)").add_argument
    add("--tls", action="store_true", help="encrypt with the system's certificate authorities")
    add("--tls-ca", metavar="FILE", help="encrypt, trusting this certificate authority (PEM)")
    add("--tls-cert", metavar="FILE", help="this client's certificate, for mutual TLS (PEM)")
    add("--tls-key", metavar="FILE", help="its key (PEM)")
    add = parser.add_argument_group("settings and what is told of the run").add_argument
    add("--config", metavar="FILE.toml", help="options from a TOML file; the command line wins")
    add("--metrics-listen", metavar="HOST:PORT", help="serve Prometheus metrics there, e.g. 127.0.0.1:9465")
    add("--otel-endpoint", metavar="URL", help="send traces to this OpenTelemetry collector, e.g. http://127.0.0.1:4317")
    add("--explain", action="store_true", help="log every decision with its inputs and candidates")
    add("--log-level", choices=("debug", "info", "warning", "error"), default="warning", help="to standard error (default warning)")
    add("--log-format", choices=FORMATS, default="text", help="json: one object a line, the status included (default text)")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[ClientConfig | CamerasConfig, str, str]:
    """The configuration, the log level and the log format.

    Raises:
        ConfigError: a setting is wrong.
    """
    from edge_client.cameras.tables import CamerasConfig, read_any

    given = vars(build_parser().parse_args(argv))
    level, form = given.pop("log_level"), given.pop("log_format")
    path = given.pop("config", None)
    config = read_any(Path(path) if path else None, given)
    cameras = config.cameras if isinstance(config, CamerasConfig) else (config,)
    for option, target in ((o, getattr(c, o)) for c in cameras for o in ("output", "save_video")):
        if path and target not in (None, "-") and Path(target).absolute() == Path(path).absolute():
            raise ConfigError(f"--{option.replace('_', '-')} {target} is the file of --config; give it another name")
    return config, level, form


def main(argv: Sequence[str] | None = None, make: Callable[[ClientConfig, Console], App] | None = None) -> int:
    """Runs the client and returns its exit code.

    Args:
        argv: the command line; None: the process's own.
        make: makes the client, for a test bed that puts parts of its own in; None: ``App``.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["doctor"]:
        from edge_client.doctor.command import main as doctor

        return doctor(words[1:])
    interrupts = Interrupts()
    interrupts.install()
    try:
        config, level, form = parse(argv)
        logging.getLogger("edge_client.explain").setLevel("INFO" if getattr(config, "explain", False) else "WARNING")
        if _on_standard_output(config) and was_closed(1):
            raise ConfigError("--output - is standard output, and standard output is closed")
        # In a terminal a log line replaces the status line, which is then written again below it.
        set_up(level, form, sys.stderr, before="\r\x1b[2K" if sys.stderr.isatty() else "")
        return _run(config, form, make, interrupts)
    except HeadtailError as error:
        consoles.say(sys.stderr, f"edge-client: {error.message}")
        return error.exit_code
    finally:
        interrupts.restore()


def _run(
    config: ClientConfig | CamerasConfig, form: str, make: Callable[[ClientConfig, Console], App] | None, interrupts: Interrupts
) -> int:
    # FFmpeg's and OpenCV's own complaints would stand beside our one clear sentence; both read this when they are loaded.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from edge_client.app import App
    from edge_client.console import Console

    status_log = logging.getLogger(f"{__package__}.status")
    status_log.setLevel("INFO")
    console = Console(
        results=sys.stdout,
        status=(
            (lambda text: status_log.info("%s", text.strip())) if form == "json" else (lambda text: consoles.put(sys.stderr, text))
        ),
        terminal=sys.stderr.isatty() and form == "text",
        columns=shutil.get_terminal_size().columns,
        stopping=lambda: interrupts.stopping,
    )
    try:
        ending = _to_its_end(_program(config, console, make or App), interrupts)
    except HeadtailError:
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("unexpected", exc_info=True)
        where = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}, {error}"
        logging.getLogger(__name__).critical("our own fault (%s); --log-level debug shows the traceback", what)
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        return 1
    code = ending.error.exit_code if ending.error else 0
    if ending.summary.get("frames"):
        consoles.say(sys.stderr if _on_standard_output(config) else sys.stdout, ending.text)
    if ending.error is not None:
        facts = {"code": ending.error.code, "exit_code": code}
        say(f"edge-client: {ending.error.message}", form, sys.stderr, logger="edge_client", extra=facts)
    if config.json:
        consoles.say(sys.stdout, json.dumps({**ending.summary, "exit_code": code}))
    return code


def _program(config: ClientConfig | CamerasConfig, console: Console, make: Callable[[ClientConfig, Console], App]) -> Program:
    """What this configuration runs."""
    from edge_client.cameras.fleet import Fleet
    from edge_client.cameras.tables import CamerasConfig
    from edge_client.frigate.app import FrigateApp

    if isinstance(config, CamerasConfig):
        return Fleet(config, console)
    return make(config, console) if config.frigate is None else FrigateApp(config, console)


def _on_standard_output(config: ClientConfig | CamerasConfig) -> bool:
    return getattr(config, "output", None) == "-"


def _to_its_end(client: Program, interrupts: Interrupts) -> Ending:
    """Runs the client in a loop of its own. Threads that do not come back are not waited for."""
    loop = asyncio.new_event_loop()
    interrupts.bind(loop, client.interrupt)
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(client.run())
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()


def entry() -> NoReturn:
    """The command: ``main`` in a process of its own, which ends whatever its threads are at."""
    steady_streams()
    leave(main())


if __name__ == "__main__":
    entry()
