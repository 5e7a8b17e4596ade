"""What a device could do alone in the time its encoder takes: the whole model at smaller inputs, no bytes at all.

A split is worth its bytes only where it is more accurate than that. All graphs are clocked in turns, so that other work on the
machine hits them alike.

Shape legend: M photos, R rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from protos.errors import BundleError, ConfigError
from protos.messages import Answer, Classification
from splitters.bundle import Bundle
from splitters.bundle.manifest import Preprocess
from splitters.cutting.onnx.cuts import macs_of
from splitters.evaluation.bdrate import interval
from splitters.evaluation.judging.tasks import Score
from splitters.evaluation.measure import Each, Photos, nothing
from splitters.runtime.head import Head
from splitters.runtime.pictures import read_picture
from splitters.runtime.sessions import open_session
from splitters.tasks.base import form_of, open_task
from splitters.tasks.preprocess import input_image, normalise

_ROUNDS, _WARM = 40, 4
Name = TypeVar("Name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Alone:
    """The whole model at one input size, on the device.

    Attributes:
        size_px: shorter side of the input.
        accuracy: in the report's metric.
        gap: accuracy minus that at full size, (value, low, high), paired bootstrap.
        macs: multiply-accumulates for one picture.
        ms: processor time on one thread, median.
    """

    size_px: int
    accuracy: float
    gap: tuple[float, float, float]
    macs: int
    ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceWork:
    """What the device's work buys with and without a server.

    Attributes:
        alone: the whole model, full size first, then falling.
        heads_ms: stem and each set of encoder graphs, the same, clocked in turns with ``alone``.
    """

    alone: tuple[Alone, ...]
    heads_ms: Mapping[tuple[str, ...], float]

    def share(self, ms: float) -> float:
        """Of the whole model's time at full size."""
        return ms / self.alone[0].ms

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types; ``time_share`` and ``macs_share`` are of the whole model at full size."""
        macs = self.alone[0].macs
        return {
            "alone": [{**asdict(a), "time_share": self.share(a.ms), "macs_share": a.macs / macs} for a in self.alone],
            "heads": [{"graphs": list(g), "ms": ms, "time_share": self.share(ms)} for g, ms in self.heads_ms.items()],
        }


def measure_alone(
    bundle: Bundle, photos: Photos, sizes_px: Sequence[int], score: Callable[[Sequence[Answer]], Score], *, each: Each = nothing
) -> DeviceWork:
    """Accuracy and time of a classifier's whole model at its own and at smaller inputs, and the time of the bundle's heads.

    Args:
        bundle: holds the whole model as ONNX.
        photos: read again for each size, as a device that works alone would.
        sizes_px: shorter sides of the smaller inputs.
        score: judges answers, one a photo.
        each: called after every photo at every size.

    Raises:
        ConfigError: it is no classifier, there is no whole model, or it does not run at one of these sizes.
    """
    manifest = bundle.manifest
    path = manifest.tail.get("whole")
    if form_of(manifest.task) is not Classification or not path or not str(path).endswith(".onnx"):
        raise ConfigError(f"{manifest.name} has no whole classifier as ONNX that could run alone at smaller inputs")
    full = min(manifest.preprocess.size_px)
    if bad := [s for s in sizes_px if not 0 < s < full]:
        raise ConfigError(f"a smaller input has 1 to {full - 1} px, not {bad[0]}")
    data, scores, macs = bundle.read_part(path), dict[int, Score](), dict[int, int]()
    work: dict[int | tuple[str, ...], Callable[[], object]] = {}
    for size in (full, *sorted(set(sizes_px), reverse=True)):
        try:
            model, macs[size] = _resized(data, size / full)
            answers = _answers(bundle, model, _smaller(manifest.preprocess, size / full), photos, each)
        except (BundleError, RuntimeError, ValueError) as error:  # of ONNX Runtime, of ONNX, of what decodes the outputs
            raise ConfigError(f"{manifest.name} does not run at {size} px: {error}") from error
        scores[size] = score(answers)
        work[size] = _blank_run(model)
    head = Head(bundle)
    given = head.inputs(photos.pictures[0], head.inputs.blank())
    heads = tuple(dict.fromkeys(p.graphs for p in bundle.points))
    work |= {graphs: lambda graphs=graphs: head.latents(head.stem(given), graphs) for graphs in heads}  # type: ignore[misc]
    ms = in_turns(work)
    whole = scores[full]
    alone = tuple(
        Alone(size_px=size, accuracy=s.value, gap=_gap(s, whole), macs=macs[size], ms=ms[size]) for size, s in scores.items()
    )
    return DeviceWork(alone=alone, heads_ms={graphs: ms[graphs] for graphs in heads})


def _gap(score: Score, whole: Score) -> tuple[float, float, float]:
    return score.value - whole.value, *interval(score.drawn - whole.drawn)


def _answers(bundle: Bundle, model: bytes, spec: Preprocess, photos: Photos, each: Each) -> list[Answer]:
    """The model's, one a photo."""
    session, task = open_session(model), open_task(bundle.manifest)
    name, answers = session.get_inputs()[0].name, list[Answer]()
    for file, size_px in zip(photos.files, photos.sizes_px, strict=True):
        answers += task.decode(session.run(None, {name: normalise(input_image(read_picture(file), spec), spec)}), [size_px])
        each()
    return answers


def _blank_run(model: bytes) -> Callable[[], object]:
    session = open_session(model)
    given = session.get_inputs()[0]
    blank = {given.name: np.zeros(given.shape, np.float32)}
    return lambda: session.run(None, blank)


def in_turns(work: Mapping[Name, Callable[[], object]], rounds: int = _ROUNDS) -> dict[Name, float]:
    """Median processor milliseconds of this thread for every piece of work, each done once in every round."""
    taken = np.zeros((rounds + _WARM, len(work)))
    for row in taken:
        for i, run in enumerate(work.values()):
            start_ns = time.thread_time_ns()
            run()
            row[i] = (time.thread_time_ns() - start_ns) / 1e6
    return dict(zip(work, map(float, np.median(taken[_WARM:], axis=0)), strict=True))


def _smaller(spec: Preprocess, share: float) -> Preprocess:
    height, width = (round(share * side) for side in spec.size_px)
    resize_px = None if spec.resize_px is None else round(share * spec.resize_px)
    return replace(spec, size_px=(height, width), resize_px=resize_px)


def _resized(data: bytes, share: float) -> tuple[bytes, int]:
    """The graph for one picture of another input size, and its multiply-accumulates; what it says of inner shapes goes."""
    model = onnx.load_from_string(data)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_value = 1
    for dim in dims[2:]:
        dim.dim_value = round(share * dim.dim_value)
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model)
    return model.SerializeToString(), macs_of(list(ir.from_proto(inferred).graph))
