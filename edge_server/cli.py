"""``edge-server``: serves the tails of one or more bundles."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import resource
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edge_server.config import (
    DEFAULT_LISTEN,
    DEFAULT_MODEL,
    BatchConfig,
    Limits,
    RayConfig,
    SecurityConfig,
    ServerConfig,
    TailConfig,
)
from edge_server.memory import keep_freed_memory
from protos.errors import ConfigError, HeadtailError
from protos.logs import FORMATS, say, set_up
from protos.process import leave, steady_streams
from protos.schema import read_toml_file
from protos.version import package_version

log = logging.getLogger("edge_server")

_NOT_IN_FILE = ("help", "version", "config")

_EPILOG = """\
examples:
  edge-server --model efficientnet-lite0
  edge-server --listen 0.0.0.0:50051 --model detector --tls-cert s.pem --tls-key s.key --token-file tokens
  edge-server --config /etc/headtail/server.toml
  edge-server --backend ray --replicas 1:4 --model detector
  edge-server --listen 127.0.0.1:0 --model ./my-bundle --port-file port.txt

signals: SIGTERM and SIGINT drain and end with 0; a second one ends at once; SIGHUP reads the bundles from disk again.
exit codes: 0 done, 2 a wrong setting or missing package, 4 a bundle is absent or altered, 5 unknown model,
11 a tail cannot be run, 12 a bundle cannot be written, 1 an error of ours, 130 stopped at the second signal.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="edge-server",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"%(prog)s {package_version()}")
    p.add_argument("--config", type=Path, metavar="FILE.toml", help="options from a TOML file; the command line wins")
    p.add_argument(
        "--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="address; port 0 picks a free one (default %(default)s)"
    )
    p.add_argument(
        "--model", action="append", metavar="NAME|DIR",
        help=f"a default bundle's name (exported on first use) or a directory; repeat for several; without: {DEFAULT_MODEL}",
    )  # fmt: skip
    p.add_argument("--models-dir", type=Path, metavar="DIR", help="bundles below it may be loaded by an operator's call")
    p.add_argument(
        "--adapt", type=Path, metavar="DIR",
        help="fit bundles to what their cameras show, from symbols decoded anyway, and put the copies in DIR into use",
    )  # fmt: skip
    p.add_argument("--adapt-every-s", type=float, default=3600.0, help="between two such fits (default %(default)s)")
    p.add_argument(
        "--backend", default="embedded", help="where tails run: embedded (in this process), ray (Ray Serve), or a package's"
    )
    p.add_argument(
        "--grace-s", type=float, default=10.0, help="longest a shutdown waits for frames in flight (default %(default)s)"
    )
    p.add_argument("--port-file", type=Path, metavar="FILE", help="write HOST:PORT here once listening")
    p.add_argument("--parent-pid", type=int, metavar="PID", help="end when this process does")
    p.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics there; 0 picks a free port")
    p.add_argument(
        "--web", metavar="HOST:PORT", help="serve a page of sessions, models, load and refusals there, e.g. 127.0.0.1:8081"
    )
    p.add_argument(
        "--otel-endpoint", metavar="URL",
        help="send traces to this OpenTelemetry collector, e.g. http://127.0.0.1:4317; the OTEL_* variables work too",
    )  # fmt: skip
    p.add_argument("--reuse-port", action="store_true", help="let several edge-server processes share the address")
    p.add_argument("--no-quic", action="store_true", help="open no UDP port beside the TCP one: frames come by gRPC alone")
    p.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    p.add_argument("--log-format", default="text", choices=FORMATS, help="json: one object a line (default %(default)s)")
    tail = p.add_argument_group("tail")
    tail.add_argument("--tail-threads", type=int, default=0, help="threads of the tail's math library; 0: its own choice")
    tail.add_argument("--tail-cpus", default="", metavar="0,1", help="cores the tail's thread is pinned to; replicas deal them out")
    tail.add_argument("--tail-device", default="cpu", help="cpu or cuda; ONNX tails need onnxruntime-gpu (default %(default)s)")
    tail.add_argument("--decode-threads", type=int, default=2, help="threads that decode payloads (default %(default)s)")
    tail.add_argument("--max-batch", type=int, default=16, help="most frames in one run of the tail (default %(default)s)")
    tail.add_argument(
        "--max-batch-delay-ms", type=float, default=0.0, help="hold a lone frame back so that others join it (default 0)"
    )
    tail.add_argument("--max-queue", type=int, default=1024, help="frames that may wait for the tail (default %(default)s)")
    ray = p.add_argument_group("ray")
    ray.add_argument("--ray-address", default="", help="of the cluster; without it one is started on this machine")
    ray.add_argument("--replicas", default="1", metavar="N|MIN:MAX", help="of each bundle's tail (default %(default)s)")
    ray.add_argument("--cpus-per-replica", type=float, default=1.0, help="cores Ray sets aside for one (default %(default)s)")
    ray.add_argument("--gpus-per-replica", type=float, default=0.0, help="GPUs, fractions allowed (default %(default)s)")
    ray.add_argument(
        "--deploy-timeout-s", type=float, default=300.0, metavar="S",
        help="how long a tail's start may take, waiting for free cores included (default %(default)s)",
    )  # fmt: skip
    ray.add_argument(
        "--tails-per-replica", type=int, default=0, metavar="N",
        help="where memory is short: all bundles share the replicas, each of which holds the N tails used last (default: a bundle "
        "has replicas of its own)",
    )  # fmt: skip
    limits = p.add_argument_group("limits")
    limits.add_argument("--max-payload-mib", type=float, default=4.0, help="of one layer (default %(default)s)")
    limits.add_argument("--max-sessions", type=int, default=2048, help="open at once (default %(default)s)")
    limits.add_argument("--max-connections", type=int, default=8192, help="open at once (default %(default)s)")
    limits.add_argument("--max-in-flight", type=int, default=64, help="unanswered frames of a session (default %(default)s)")
    limits.add_argument(
        "--max-unary-in-flight", type=int, default=256, metavar="N",
        help="unanswered frames of unary calls, of each token's holders together (default %(default)s)",
    )  # fmt: skip
    door = p.add_argument_group("security")
    door.add_argument("--tls-cert", type=Path, metavar="PEM", help="this server's certificate: encrypts every connection")
    door.add_argument("--tls-key", type=Path, metavar="PEM", help="its key")
    door.add_argument("--tls-client-ca", type=Path, metavar="PEM", help="require client certificates signed by it")
    door.add_argument("--token-file", type=Path, metavar="FILE", help="lines of 'name token'; read again when it changes")
    door.add_argument(
        "--operator-token-file", type=Path, metavar="FILE",
        help="lines of 'name token' of those who may load and unload models while the server runs; without it nobody may",
    )  # fmt: skip
    door.add_argument("--max-sessions-per-token", type=int, default=0, metavar="N", help="open at once; 0: no quota")
    door.add_argument("--frames-per-s-per-token", type=float, default=0.0, metavar="F", help="frames/s; 0: no quota")
    door.add_argument("--bytes-per-s-per-token", type=float, default=0.0, metavar="B", help="payload bytes/s; 0: no quota")
    return p


def with_file(args: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line ``argv`` once more, above the file of ``--config``, whose keys are the long options, with ``_`` or ``-``.

    Raises:
        ConfigError: the file cannot be read, has a name that is no option, or a value of another kind.
    """
    parser = build_parser()
    what = f"--config {args.config}"
    options = {action.dest: action for action in parser._actions if action.dest not in _NOT_IN_FILE}  # noqa: SLF001 - no public way
    found = {}
    for name, value in read_toml_file(args.config, what=what).items():
        if name not in options:
            raise ConfigError(f"{what} has the unknown name {name!r}; known are {', '.join(sorted(options))}")
        found[name] = _given(options[name], value, f"{what}, {name}")
    if args.model:  # what is given on the command line is not added to the file's
        found.pop("model", None)
    parser.set_defaults(**found)
    return parser.parse_args(argv)


def _given(option: argparse.Action, value: object, what: str) -> object:
    """A value of the file as the option's own."""
    if option.dest == "model" and isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return value
    kinds: dict[object, Any] = {None: str, Path: str, float: int | float}
    kind: Any = kinds.get(option.type, option.type)
    if option.nargs == 0:
        kind = bool
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        words = {bool: "true or false", int: "a whole number", str: "a text"}.get(kind, "a number")
        raise ConfigError(f"{what} must be {words}, got {value!r}")
    if option.choices is not None and value not in option.choices:
        raise ConfigError(f"{what} must be one of {', '.join(option.choices)}, got {value!r}")
    if option.dest == "model":
        return [value]
    return Path(value) if option.type is Path and isinstance(value, str) else value


def _cpus(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--tail-cpus must be core numbers, for instance 0,1, got {text!r}") from None


def _replicas(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(":")
    try:
        return int(fewest), int(most or fewest)
    except ValueError:
        raise ConfigError(f"--replicas must be N or MIN:MAX, got {text!r}") from None


def _scaled(option: str, value: float, factor: float) -> int:
    if not math.isfinite(value):
        raise ConfigError(f"{option} must be a finite number, got {value}")
    return int(value * factor)


def config_from(args: argparse.Namespace) -> ServerConfig:
    """The parsed arguments as a checked configuration.

    Raises:
        ConfigError: a value is out of range.
    """
    payload_bytes = _scaled("--max-payload-mib", args.max_payload_mib, 1 << 20)
    return ServerConfig(
        listen=args.listen, models=tuple(args.model or [DEFAULT_MODEL]), models_dir=args.models_dir,
        adapt_dir=args.adapt, adapt_every_s=args.adapt_every_s, backend=args.backend,
        grace_s=args.grace_s, port_file=args.port_file, parent_pid=args.parent_pid, metrics_port=args.metrics_port,
        web=args.web,
        otel_endpoint=args.otel_endpoint, reuse_port=args.reuse_port, quic=not args.no_quic,
        limits=Limits(
            max_payload_bytes=payload_bytes, max_frame_bytes=max(8 << 20, payload_bytes), max_sessions=args.max_sessions,
            max_in_flight=args.max_in_flight, max_unary_in_flight=args.max_unary_in_flight,
            max_connections=args.max_connections,
        ),
        batch=BatchConfig(
            max_batch=args.max_batch, max_delay_ns=_scaled("--max-batch-delay-ms", args.max_batch_delay_ms, 1e6),
            max_queue=args.max_queue,
        ),
        tail=TailConfig(
            threads=args.tail_threads, device=args.tail_device, cpus=_cpus(args.tail_cpus), decode_threads=args.decode_threads
        ),
        ray=RayConfig(
            address=args.ray_address, replicas=_replicas(args.replicas), cpus_per_replica=args.cpus_per_replica,
            gpus_per_replica=args.gpus_per_replica, tails_per_replica=args.tails_per_replica, deploy_s=args.deploy_timeout_s,
        ),
        security=SecurityConfig(
            tls_cert=args.tls_cert, tls_key=args.tls_key, tls_client_ca=args.tls_client_ca, token_file=args.token_file,
            operator_token_file=args.operator_token_file,
            max_sessions_per_token=args.max_sessions_per_token, frames_per_s_per_token=args.frames_per_s_per_token,
            bytes_per_s_per_token=args.bytes_per_s_per_token,
        ),
    )  # fmt: skip


def _open_files(needed: int) -> None:
    """A login's limit of 1,024 open files is fewer than the connections we mean to take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # where the system allows fewer than the limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft != resource.RLIM_INFINITY and soft < needed:
        log.warning("this process may open %d files, fewer than --max-connections and what else it needs (%d)", soft, needed)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code.

    Args:
        argv: the command line; None: the process's own, which ends with this call.
    """
    own = argv is None
    if own:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a reload that is asked for before there is anything to load
        steady_streams()
    code = _run(argv)
    if own:
        leave(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    set_up(args.log_level, args.log_format, sys.stderr)
    try:
        if args.config is not None:
            args = with_file(args, argv)
            set_up(args.log_level, args.log_format, sys.stderr)
        config = config_from(args)
        if config.exposed:
            log.warning("%s is open to other machines without TLS or token: anyone who reaches it can use it", config.listen)
        if config.operators_exposed:
            log.warning("%s is open to other machines without TLS: operators' tokens travel unencrypted", config.listen)
        keep_freed_memory()
        _open_files(config.limits.max_connections + 256)
        asyncio.run(_serve(config))
        return 0
    except HeadtailError as error:
        say(
            f"edge-server: {error.message}", args.log_format, sys.stderr, logger="edge_server",
            extra={"code": error.code, "exit_code": error.exit_code},
        )  # fmt: skip
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        log.exception("edge-server failed")
        say("edge-server: an error of ours; the lines above say where", args.log_format, sys.stderr, logger="edge_server", extra={})
        return 1


class _Abandoned(ThreadPoolExecutor):
    """Threads that nobody waits for at the end: reading a bundle, or making one, may take minutes."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See concurrent.futures."""
        del wait, cancel_futures
        super().shutdown(wait=False, cancel_futures=True)


async def _serve(config: ServerConfig) -> None:
    asyncio.get_running_loop().set_default_executor(_Abandoned(thread_name_prefix="server"))
    try:
        from edge_server.process import serve
    except ImportError as error:
        from protos.errors import MissingDependencyError

        raise MissingDependencyError(f"{error.name} is not installed; the server needs: pip install 'headtail[server]'") from error
    await serve(config)


if __name__ == "__main__":
    sys.exit(main())
