"""Loads the tail a bundle describes and runs it on batches; the server's only way to a model.

Shape legend: N batch. Latents are float32, batch first, one array per latent tensor of the manifest.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from protos.errors import BundleError, ConfigError
from protos.messages import Answer
from splitters.bundle import Bundle
from splitters.registry import Registry
from splitters.runtime.sessions import has_cuda, open_graph
from splitters.tasks.base import Floats, SizePx, Task, open_task
from splitters.tasks.preprocess import normalise

log = logging.getLogger(__name__)

TAILS: Registry[Callable[[str, Mapping[str, Any], Mapping[str, Any]], Any]] = Registry(
    "headtail.tails",
    "tail factory",
    {"torchvision": "splitters.cutting.rcnn.detectors:build_tail"},
    error=BundleError,
)
"""Who builds the torch module of a tail: called with the name behind the colon, the manifest's ``tail`` and all tensors of its
weights. The bundle names the factory, never code."""


class Runner(Protocol):
    """A loaded tail, or a whole model."""

    def __call__(self, arrays: Sequence[Floats], /) -> list[Floats]:
        """Raw outputs, batch first."""
        ...


class Tail:
    """A loaded tail with its task.

    Args:
        bundle: whose tail it is.
        tail: latents to raw outputs.
        whole: normalised input to raw outputs, for offloaded images; None where the bundle has no whole model.
        task: decodes the raw outputs.
    """

    def __init__(self, bundle: Bundle, tail: Runner, whole: Runner | None, task: Task) -> None:
        self.bundle = bundle
        self._tail = tail
        self._whole = whole
        self._task = task

    def run(self, latents: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """Answers a batch of latents.

        Args:
            latents: one (N, ...) array per latent tensor.
            sizes_px: (width, height) of each source frame.
        """
        return self._task.decode(self._tail(latents), sizes_px)

    @property
    def takes_images(self) -> bool:
        """Whether ``run_images`` works, that is, offload is possible."""
        return self._whole is not None

    def run_images(self, images: Sequence[NDArray[np.uint8]], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """Answers a batch of whole inputs, as offloaded: (h, w, 3) uint8 BGR of the model's own input size.

        Raises:
            ConfigError: the bundle has no whole model, or an image has another size than the model's input.
        """
        spec = self.bundle.manifest.preprocess
        if self._whole is None:
            raise ConfigError(f"model {self.bundle.manifest.name!r} takes latents only; offload is not possible")
        for image in images:
            if image.shape != (*spec.size_px, 3):
                raise ConfigError(f"an offloaded image must be {spec.size_px} px (height, width), got {image.shape[:2]}")
        batch = np.concatenate([normalise(image, spec) for image in images])
        return self._task.decode(self._whole([batch]), sizes_px)


def load_tail(bundle: Bundle, *, device: str = "cpu", threads: int = 0) -> Tail:
    """Loads a bundle's tail, and its whole model where it has one.

    Args:
        bundle: opened and verified.
        device: a torch device, for tails of kind ``torch``; one of kind ``onnx`` runs on the processor, and says so.
        threads: of a tail of kind ``onnx``; 0: as torch is set, or the environment says.

    Raises:
        BundleError: the tail's kind or factory is unknown, or its parts do not fit it.
    """
    spec = bundle.manifest.tail
    kind = spec.get("kind")
    task = open_task(bundle.manifest)
    if kind == "onnx":
        cuda = device.startswith("cuda") and has_cuda()
        if device != "cpu" and not cuda:
            log.warning(
                "%s: its tail is ONNX and runs on the processor, not on %s; the package onnxruntime-gpu would run it there",
                bundle.manifest.name, device,
            )  # fmt: skip
        whole = spec.get("whole")
        batch = int(spec.get("batch", 0))
        return Tail(
            bundle, batched(_onnx(bundle, spec["path"], threads, cuda), batch),
            batched(_onnx(bundle, str(whole), threads, cuda), batch) if whole else None, task,
        )  # fmt: skip
    if kind == "torch":
        return _torch_tail(bundle, spec, task, device)
    raise BundleError(f"tail kind {kind!r} is unknown; this headtail knows onnx and torch")


def _onnx(bundle: Bundle, path: str, threads: int, cuda: bool) -> Runner:
    return open_graph(bundle.part_path(path), threads=threads or _threads(), spinning=True, cuda=cuda)


def batched(runner: Runner, batch: int) -> Runner:
    """A runner whose model takes ``batch`` 1: frame by frame, the answers as one batch again. 0: any batch, as it is.

    Where frames differ in length, as after a suppression in the graph, zeros fill up.
    """
    if batch != 1:
        return runner

    def run(arrays: Sequence[Floats]) -> list[Floats]:
        frames = [runner([a[n : n + 1] for a in arrays]) for n in range(len(arrays[0]))]
        return [_stacked(outputs) for outputs in zip(*frames, strict=True)]

    return run


def _stacked(parts: Sequence[Floats]) -> Floats:
    if len(parts) == 1:
        return parts[0]
    most = [max(sides) for sides in zip(*(p.shape[1:] for p in parts), strict=True)]
    joined = np.zeros((len(parts), *most), parts[0].dtype)
    for row, part in zip(joined, parts, strict=True):
        row[tuple(slice(0, side) for side in part.shape[1:])] = part[0]
    return cast("Floats", joined)


def _threads() -> int:
    """As torch is set where it is in use; importing it for that takes longer than all the rest.

    Never 0, which would have ONNX Runtime pin its threads to cores of its own choice, whoever else is busy there.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and text != "0" else _cores()


def _cores() -> int:
    """That this thread may use; two hardware threads of one core are one."""
    allowed = os.sched_getaffinity(0)
    try:
        return len({Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list").read_bytes() for n in allowed})
    except OSError:
        return len(allowed)


def _torch_tail(bundle: Bundle, spec: Mapping[str, Any], task: Task, device: str) -> Tail:
    import torch
    from safetensors.torch import load_file

    family, _, name = str(spec.get("factory", "")).partition(":")
    build = TAILS.get(family)
    state = {key: value for path in spec["weights"] for key, value in load_file(bundle.part_path(path)).items()}
    module = build(name, spec, state).eval().to(device)

    def runner(function: Any) -> Runner:
        def run(arrays: Sequence[Floats]) -> list[Floats]:
            with torch.inference_mode():
                outputs = function(*(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in arrays))
            tensors = outputs if isinstance(outputs, tuple | list) else (outputs,)
            return [t.float().cpu().numpy() for t in tensors]

        return run

    if hasattr(module, "answers"):  # a detector whose own postprocess needs the source sizes
        return _OwnAnswers(bundle, module)

    whole = runner(module.whole) if hasattr(module, "whole") else None
    return Tail(bundle, runner(module), whole, task)


class _OwnAnswers(Tail):
    """A tail whose module turns latents and source sizes into answers by itself (torchvision's detectors)."""

    def __init__(self, bundle: Bundle, module: Any) -> None:
        self.bundle = bundle
        self._module = module
        self._whole = None

    def run(self, latents: Sequence[Floats], sizes_px: Sequence[SizePx]) -> list[Answer]:
        """See ``Tail.run``."""
        return cast("list[Answer]", self._module.answers(latents, sizes_px))
