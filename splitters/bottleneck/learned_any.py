"""A learned split of any model the splitter can cut: stem, body and tapped tail from the model's own graph.

Shape legend: N batch; the cut is crossed by tensors of any number and layout (`splitters.bottleneck.crossing`), fused to one map
(N, F, h, w); the latent is (N, C, h, w), whatever the operating point.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from protos.errors import ConfigError
from protos.messages import Detection
from splitters.bottleneck.bottleneck import Decoder, GainQuantiser
from splitters.bottleneck.crossing import Crossing, Gather, Scatter, describe, latent_grid
from splitters.bottleneck.ensemble import EncoderEnsemble, OwnEncoder, SmallEncoder, SmallEncoderConfig, Tier
from splitters.bottleneck.learned import LearnedSplit, StagedModel
from splitters.bottleneck.raw_outputs import RawOutput, Scores, as_queries, raw_outputs
from splitters.bottleneck.sensitivity import output_metric, sensitive_start
from splitters.bottleneck.token_grids import token_grids
from splitters.cutting.graph.partition import Cut
from splitters.cutting.graph.split import Cutter, Split
from splitters.cutting.graph.trace import TensorInfo
from splitters.tasks.base import form_of


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyCutConfig:
    """Where a model is cut and how its bottleneck is built.

    Attributes:
        at: the cut, as `splitters profile` names it.
        stem_at: an earlier cut whose map the cheap encoders start from; empty: no cheap encoders.
        match: later cuts at which student and teacher are compared; empty: three of the model's own, spread over the tail.
        channels: latent channels.
        shrink: how many times coarser than the coarsest crossing map the latent is, its cells holding whole patches; 0: as many
            times as makes it a sixteenth of the input.
        steps: quantiser steps of the gain tiers in units of the latent's standard deviation, finest first.
        width: of the decoder.
        depth: the decoder's residual blocks.
        small: channels of the cheap encoder's stages at width 1.
        task: ``classification`` or ``detection``.
        scores: what the decoding makes of a detector's logits outside the model.
    """

    at: str
    stem_at: str = ""
    match: tuple[str, ...] = ()
    channels: int = 32
    shrink: int = 1
    steps: tuple[float, ...] = (0.4, 0.7, 1.2, 2.0)
    width: int = 96
    depth: int = 2
    small: tuple[int, ...] = (48, 96, 144, 192)
    task: str = "classification"
    scores: Scores = "given"

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 4096 or self.shrink < 0:
            raise ConfigError(
                f"a latent has 1..4096 channels and shrinks by 0 (chosen) or more, got {self.channels} and {self.shrink}"
            )


_AUTO_MATCHES = 3
_CHUNK = 16
_STRIDE = 16
_METRIC_PHOTOS = 48


class _Flat(nn.Module):
    """A graph with its outputs as a tuple of contiguous tensors, or as the tensor where it is only one."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Runs the graph."""
        found = tuple(t.contiguous() for t in self.inner(x))
        return found if len(found) > 1 else found[0]


class FusedEncoder(OwnEncoder):
    """The base model's own layers up to the cut, its crossing tensors fused to one map, then one 1x1 convolution.

    Args:
        body: stem map to crossing tensors.
        gather: these to the fused map.
        c_latent: latent channels.
    """

    def __init__(self, body: nn.Module, gather: Gather, c_latent: int) -> None:
        super().__init__(body, gather.channels, c_latent)
        self.gather = gather

    def from_cut(self, cut: Tensor | tuple[Tensor, ...]) -> Tensor:
        """The latent of crossing tensors."""
        latent: Tensor = self.project(self.gather(*(cut if isinstance(cut, tuple) else (cut,))))
        return latent

    def forward(self, x: Tensor) -> Tensor:
        """Maps the stem's map to the latent (N, C, h, w)."""
        return self.from_cut(self.body(x))


class FusedDecoder(Decoder):
    """Latent to crossing tensors, a tuple of them.

    Args:
        c_latent: latent channels.
        gather: what is to be undone.
        width: channels of the correction.
        depth: its residual blocks.
    """

    def __init__(self, c_latent: int, gather: Gather, width: int, depth: int) -> None:
        super().__init__(c_latent, gather.channels, width, depth)
        self.scatter = Scatter(gather)

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Maps (N, C, h, w) to what crosses the cut."""
        tensors: tuple[Tensor, ...] = self.scatter(super().forward(latent))
        return tensors


def between(module: fx.GraphModule, start: Sequence[str]) -> fx.GraphModule:
    """The part of ``module`` that is computed from the nodes named in ``start``.

    Raises:
        ConfigError: the outputs need something else of the image too.
    """
    graph, env = fx.Graph(), {}
    by_name = {n.name: n for n in module.graph.nodes}
    for i, name in enumerate(start):
        env[by_name[name]] = graph.placeholder(f"map_{i}")

    def value(node: fx.Node) -> fx.Node:
        if node not in env:
            if node.op == "placeholder":
                raise ConfigError(f"the cut needs more of the input than {', '.join(start)}: choose another stem")
            for needed in node.all_input_nodes:
                value(needed)
            env[node] = graph.node_copy(node, value)
        return env[node]

    output = next(n for n in module.graph.nodes if n.op == "output")
    graph.output(fx.map_arg(output.args[0], value))
    return fx.GraphModule(module, graph)


class TappedTail(nn.Module):
    """A tail that also returns what its inner nodes computed.

    Args:
        tail: latents to the model's output.
        taps: names of nodes of its graph.
    """

    def __init__(self, tail: fx.GraphModule, taps: Sequence[str]) -> None:
        super().__init__()
        graph = copy.deepcopy(tail.graph)
        by_name = {n.name: n for n in graph.nodes}
        output = next(n for n in graph.nodes if n.op == "output")
        output.args = ((tuple(by_name[t] for t in taps), output.args[0]),)
        self.tapped = fx.GraphModule(tail, graph)

    def forward(self, *cut: Tensor) -> tuple[Tensor, ...]:
        """Taps in order, then the model's floating-point outputs."""
        taps, outputs = self.tapped(*cut)
        flat = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        return (*taps, *flat)


def default_matches(cutter: Cutter, at: str, count: int = _AUTO_MATCHES) -> tuple[str, ...]:
    """Cuts spread evenly over the layers behind ``at``, each the one that the fewest values cross nearby."""
    start = cutter.partitioner.find(at).position
    later = [c for c in cutter.candidates() if c.position > start]

    def values(cut: Cut) -> int:
        infos = [cutter.trace.values[n][0] for n in cut.crossing]
        return sum(math.prod(i.shape[1:]) for i in infos if isinstance(i, TensorInfo))

    span = len(later) / (count + 1)
    chosen = []
    for i in range(1, count + 1):
        near = later[max(0, round(span * (i - 0.5))) : round(span * (i + 0.5))]
        chosen += [min(near, key=values).name] if near else []
    return tuple(dict.fromkeys(chosen))


def _taps(cutter: Cutter, split: Split, config: AnyCutConfig) -> list[str]:
    """Names of the tail's nodes that are matched.

    Raises:
        ConfigError: a matched cut lies before the cut.
    """
    known = {n.name for n in split.tail.graph.nodes if n.op != "placeholder"}
    taps: list[str] = []
    for at in config.match or default_matches(cutter, config.at):
        names = cutter.split(at).latent_names
        new = [n for n in names if n in known]
        if not new:
            raise ConfigError(f"{', '.join(names)} are not computed by the tail: matched cuts must lie after {config.at!r}")
        taps += [n for n in new if n not in taps]
    return taps


def _crossings(cutter: Cutter, split: Split, at: str) -> tuple[Crossing, ...]:
    return describe(split.latent_shapes, at, token_grids(cutter.trace))


def _raw(cutter: Cutter, tail: fx.GraphModule, scores: Scores) -> tuple[RawOutput, ...]:
    """The branches of a detector's output that the tail computes."""
    shapes = {n.name: v[0] for n, v in cutter.trace.values.items() if isinstance(v[0], TensorInfo)}
    output = next(n for n in tail.graph.nodes if n.op == "output")
    nodes = [n for n in output.all_input_nodes if n.name in shapes and shapes[n.name].dtype.is_floating_point]
    inside = {n.name for n in tail.graph.nodes if n.op != "placeholder"}
    return as_queries([r for r in raw_outputs(nodes, shapes) if r.node in inside], shapes, scores)


def fused_channels(model: nn.Module, example: Tensor, config: AnyCutConfig) -> int:
    """How many channels cross the cut once they are fused to one map: a latent holds nothing more in further ones.

    Raises:
        ConfigError: what crosses the cut has no grid.
        CutError: no such cut.
    """
    cutter = Cutter(model, example)
    crossings = _crossings(cutter, cutter.split(config.at), config.at)
    return Gather(crossings, latent_grid(crossings, config.shrink or _shrink(crossings, example.shape[-2]))).channels


def build_any(model: nn.Module, example: Tensor, config: AnyCutConfig, sample: Tensor | None) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and untrained student around any cut.

    Args:
        model: any model.
        example: (N, 3, H, W), to trace it with.
        config: the cut and the bottleneck.
        sample: some tens of normalised photos, for the latent's first basis; None where trained weights will be loaded.

    Raises:
        ConfigError: what crosses the cut has no grid; a match lies before the cut.
        CutError: no such cut.
    """
    cutter = Cutter(model, example)
    split = cutter.split(config.at)
    cutter.partitioner.check_payload(config.at)
    crossings = _crossings(cutter, split, config.at)
    gather = Gather(crossings, latent_grid(crossings, config.shrink or _shrink(crossings, example.shape[-2])))
    taps = _taps(cutter, split, config)
    raw = _raw(cutter, split.tail, config.scores) if form_of(config.task) is Detection else ()
    stages = (TappedTail(split.tail, [*taps, *(r.node for r in raw)]),)
    stem, body, strides, c_stem = _front(cutter, split, config, gather.grid[0])
    base = StagedModel(
        stem=stem, body=body, stages=stages, task=config.task, cuts=len(crossings), taps=len(taps), raw=raw, same_front=True
    )
    own = FusedEncoder(copy.deepcopy(body), gather, config.channels)
    encoders: list[nn.Module] = [own]
    tiers = [Tier(name="own", runs=((0, 1.0),))]
    if strides is not None:
        small = SmallEncoderConfig(
            channels=config.small[: len(strides)], strides=strides, kernels=(5,) * len(strides), widths=(0.5, 1.0)
        )
        encoders = [SmallEncoder(small, c_stem, config.channels), own]
        tiers = [Tier(name="s", runs=((0, 0.5),)), Tier(name="m", runs=((0, 1.0),)), Tier(name="own", runs=((1, 1.0),))]
    decoder = FusedDecoder(config.channels, gather, config.width, config.depth)
    quantiser = GainQuantiser(config.channels, config.steps)
    if sample is not None:
        _start(base, own, decoder, quantiser, sample)
    return base, LearnedSplit(copy.deepcopy(stem), EncoderEnsemble(encoders, tiers), quantiser, decoder, copy.deepcopy(stages))


@torch.no_grad()
def _start(base: StagedModel, own: FusedEncoder, decoder: FusedDecoder, quantiser: GainQuantiser, sample: Tensor) -> None:
    """Scales, first basis and first prior, from samples."""
    parts = [_tuple(base.body(base.stem(sample[i : i + _CHUNK]))) for i in range(0, len(sample), _CHUNK)]
    crossed = [torch.cat(t) for t in zip(*parts, strict=True)]
    own.gather.measure(crossed)
    decoder.scatter.scale.copy_(own.gather.scale)
    metric = output_metric(base, [t[:_METRIC_PHOTOS] for t in crossed], own.gather)
    spread = sensitive_start(own.project, decoder.linear, own.gather(*crossed), metric)
    scale = spread.square().mean().sqrt()
    for log in (quantiser.log_gain, quantiser.prior_log_scale):
        log.sub_(scale.log())
    quantiser.log_ungain.add_(scale.log())
    # Later channels hold less: a prior as wide as the first one's would charge them several times their bits at the start.
    quantiser.prior_log_scale.add_(spread.clamp_min(1e-3 * float(scale)).log())


def _shrink(crossings: Sequence[Crossing], input_px: int) -> int:
    rows, _ = latent_grid(crossings, 1)
    return max(1, round(_STRIDE * rows / input_px))


def _tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _front(
    cutter: Cutter, split: Split, config: AnyCutConfig, height: int
) -> tuple[nn.Module, nn.Module, tuple[int, ...] | None, int]:
    """Stem, body, strides of a cheap encoder between them (None: none) and the stem's channels."""
    if not config.stem_at:
        return _Flat(split.head), nn.Identity(), None, 0
    early = cutter.split(config.stem_at)
    maps = _crossings(cutter, early, config.stem_at)
    if len(maps) != 1 or maps[0].layout != "chw":
        shapes = ", ".join(map(str, early.latent_shapes))
        raise ConfigError(f"cheap encoders start from one (C, H, W) map; {config.stem_at!r} is crossed by {shapes}: choose another")
    rows, ratio = maps[0].height, 1
    while rows > height:
        rows, ratio = math.ceil(rows / 2), 2 * ratio
    if rows != height or ratio > 2 ** len(config.small):
        raise ConfigError(
            f"the stem's map is {maps[0].height} high and the latent {height}: at most {len(config.small)} halvings fit"
        )
    halvings = ratio.bit_length() - 1
    strides = (2,) * halvings + (1,) * (1 if halvings == 0 else 0)
    return _Flat(early.head), _Flat(between(split.head, early.latent_names)), strides, maps[0].channels
