"""The same tail behind other servers, for comparison: LitServe, and plain Ray Serve over HTTP, each as its documentation has it.

    python -m tests.fakes.http_tails litserve|serve-http --bundle DIR --port 8123 --core 0 --max-batch 16

Both post-process and decode with our functions, batch up to the same size without waiting, and pin what runs the tail to
the given core on one thread. The payload is decoded where the framework has it done: in LitServe's worker, in the replica.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from splitters.bundle import open_bundle
from splitters.codec import codec_from_spec
from splitters.runtime.tail import load_tail
from tests.fakes.http_load import parted


class PinnedTail:
    """Payloads to answers, on one core and one thread; to be made in the thread that calls it.

    Args:
        path: the bundle's directory.
        core: the core.
    """

    def __init__(self, path: str, core: int) -> None:
        import torch

        from edge_server.memory import keep_freed_memory

        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        keep_freed_memory()
        bundle = open_bundle(Path(path))
        self._codec = codec_from_spec(json.loads(bundle.read_part(bundle.manifest.codec)), bundle.read_part)
        self._tail = load_tail(bundle)
        height, width = bundle.manifest.preprocess.size_px
        self._size = (width, height)

    def decode(self, body: bytes) -> list[np.ndarray[Any, Any]]:
        """One frame's latents."""
        return self._codec.dequantise(self._codec.decode(parted(body)))

    def run(self, frames: list[list[np.ndarray[Any, Any]]]) -> list[dict[str, Any]]:
        """A batch's answers."""
        begun_ns = time.monotonic_ns()
        answers = self._tail.run([np.stack(tensors) for tensors in zip(*frames, strict=True)], [self._size] * len(frames))
        tail_ns = time.monotonic_ns() - begun_ns
        return [
            {"top": [(c.class_id, c.score) for c in a.top], "batch_size": len(frames), "tail_ns": tail_ns}  # type: ignore[union-attr]
            for a in answers
        ]


def litserve(args: argparse.Namespace) -> None:
    """Blocks until it is killed."""
    import litserve as ls

    from tests.fakes.litserve_tail import Api

    server = ls.LitServer(Api(args.bundle, args.core, args.max_batch), accelerator="cpu", fast_queue=args.fast_queue)
    server.run(host="127.0.0.1", port=args.port, generate_client_file=False, log_level="warning", num_api_servers=1)


def serve_http(args: argparse.Namespace) -> None:
    """Blocks until it is killed. Ray's workers get the priority that ours have; all else is as Serve has it."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - as Ray spells it
    import ray
    from ray import serve
    from starlette.requests import Request

    @serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 1})
    class Plain:
        def __init__(self, path: str, core: int) -> None:
            self._model = PinnedTail(path, core)

        @serve.batch(max_batch_size=args.max_batch, batch_wait_timeout_s=0.0)
        async def infer(self, bodies: list[bytes]) -> list[dict[str, Any]]:
            return self._model.run([self._model.decode(body) for body in bodies])

        async def __call__(self, request: Request) -> dict[str, Any]:
            return await self.infer(await request.body())  # type: ignore[call-arg, arg-type, return-value]

    ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    serve.run(Plain.bind(args.bundle, args.core), name="plain", route_prefix="/predict")  # type: ignore[attr-defined]
    while True:
        time.sleep(1)


def main() -> None:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("system", choices=("litserve", "serve-http"))
    p.add_argument("--bundle", required=True)
    p.add_argument("--port", type=int, required=True)
    p.add_argument("--core", type=int, default=0)
    p.add_argument("--max-batch", type=int, default=16)
    p.add_argument("--fast-queue", action="store_true", help="LitServe's other queue, on ZeroMQ")
    args = p.parse_args()
    {"litserve": litserve, "serve-http": serve_http}[args.system](args)


if __name__ == "__main__":
    main()
