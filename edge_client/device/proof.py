"""A bundle's graphs are tried in a child process before this device relies on them.

A graph from a server may loop for ever or ask for all memory there is, and ONNX Runtime can be made to stop in neither case
from within. So a new bundle is loaded and run on a test picture in a child that has a time and a memory limit, may write no
file, and can be killed; meanwhile a camera goes on with the bundle it has. What the child measures are the device's times;
they are kept, so that every bundle is tried once on a device.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_client.device.choices import DeviceTimes, keep_times, known_times, measure
from edge_client.device.engine import Engine
from protos.errors import BundleError, HeadtailError
from protos.schema import read_json
from splitters.bundle import Bundle, open_bundle

_READY = b"ready\n"
_START_S = 120.0  # imports of our own on a slow device: not what is tried
_ANSWER_BYTES = 1 << 20
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a bundle's graphs may take at most, together.

    Attributes:
        time_s: from opening the first graph to the last measured run.
        memory_bytes: beside what the process holds before it opens one.
    """

    time_s: float = 30.0
    memory_bytes: int = 1 << 30


async def prove(bundle: Bundle, *, threads: int, cache: Path, limits: Limits | None = None) -> DeviceTimes:
    """The device's times for this bundle; where they are not known yet, its graphs are tried first.

    Args:
        bundle: opened and verified.
        threads: of the head.
        cache: where times are kept.
        limits: None: the usual ones.

    Raises:
        BundleError: the graphs cannot be run within the limits.
    """
    if (known := known_times(bundle, threads=threads, cache=cache)) is not None:
        return known
    limits = limits or Limits()
    told = [str(bundle.path), str(threads), repr(limits.time_s), str(limits.memory_bytes)]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edge_client.device.proof", *told, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL, limit=_ANSWER_BYTES, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None  # noqa: S101 - asked for above
    try:
        async with asyncio.timeout(_START_S):
            ready = await child.stdout.readline()
        async with asyncio.timeout(limits.time_s):
            answer = await child.stdout.read(_ANSWER_BYTES)
            code = await child.wait()
    except TimeoutError:
        raise BundleError(f"{_name(bundle)} did not answer a test picture within {limits.time_s:g} s") from None
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if code != 0 or ready != _READY:
        raise BundleError(f"{_name(bundle)} ended a test run on this device: {_ending(code, limits)}")
    said = read_json(answer, _Answer, what="the answer of a bundle's test run")
    times = said.times
    if times is None:
        raise BundleError(f"{_name(bundle)} cannot be run on this device: {said.message}")
    keep_times(times, bundle, threads=threads, cache=cache)
    return times


def _name(bundle: Bundle) -> str:
    return f"bundle {bundle.manifest.name!r} ({bundle.sha256[:12]})"


def _ending(code: int, limits: Limits) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"it took more than {limits.time_s:g} s of the processor, or the system ended it"
    if code < 0:
        return f"signal {-code}; perhaps it wants more than the {limits.memory_bytes >> 20} MiB allowed"
    return f"exit code {code}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What the child says, as JSON."""

    times: DeviceTimes | None = None
    message: str = ""


# ---------------------------------------------------------------- in the child


def try_bundle(path: Path, threads: int) -> DeviceTimes:
    """Opens every graph, runs each on a test picture, and measures.

    Raises:
        HeadtailError: one cannot be opened or run.
    """
    bundle = open_bundle(path, side="device")
    return measure(Engine(bundle, clock=time.monotonic_ns, threads=threads), clock=time.monotonic_ns)


def main() -> None:
    """The child: limits itself, tries the bundle, and says as JSON what came of it."""
    import onnxruntime

    onnxruntime.get_available_providers()
    path, threads, time_s, memory_bytes = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    _end_with_parent()
    _limit(resource.RLIMIT_CPU, int(time_s * threads) + 1 + int(time.process_time()))
    _limit(resource.RLIMIT_AS, _held_bytes() + memory_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    os.write(1, _READY)
    try:
        answer: dict[str, object] = {"times": try_bundle(path, threads).as_json()}
    except HeadtailError as error:
        answer = {"message": error.message}
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:  # what its outputs were taken for, they are not
        answer = {"message": f"its outputs are not what the manifest says: {error}"}
    except MemoryError:
        answer = {"message": f"it wants more than the {memory_bytes >> 20} MiB of memory allowed"}
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # threads of a graph may still hang


def _end_with_parent() -> None:
    """A client that ends at once must not leave a graph behind that computes on."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    with suppress(ValueError, OSError):
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _held_bytes() -> int:
    """The address space in use; 0 where the system does not say, and then the limit is on the whole."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


if __name__ == "__main__":
    main()
