"""A learned split of any model the splitter can cut: stem, body and tapped tail from the model's own graph.

Shape legend: N batch; the cut must be crossed by one tensor (N, D, h, w); the latent is (N, C, h, w).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from protos.errors import ConfigError
from splitters.cut import Cutter, Split
from splitters.models.bottleneck import Decoder, GainQuantiser, principal_start
from splitters.models.ensemble import EncoderEnsemble, OwnEncoder, SmallEncoder, SmallEncoderConfig, Tier
from splitters.models.learned import LearnedSplit, StagedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class AnyCutConfig:
    """Where a model is cut and how its bottleneck is built.

    Attributes:
        at: the cut, as `splitters profile` names it.
        stem_at: an earlier cut whose map the cheap encoders start from; empty: no cheap encoders.
        match: later cuts at which student and teacher are compared.
        channels: latent channels.
        steps: quantiser steps of the gain tiers in units of the latent's standard deviation, finest first.
        width: of the decoder.
        small: channels of the cheap encoder's stages at width 1.
        task: ``classification`` or ``detection``.
    """

    at: str
    stem_at: str = ""
    match: tuple[str, ...] = ()
    channels: int = 32
    steps: tuple[float, ...] = (0.4, 0.7, 1.2, 2.0)
    width: int = 96
    small: tuple[int, ...] = (48, 96)
    task: str = "classification"


class _Single(nn.Module):
    """A graph of one input and one output tensor, without the tuple around the output."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.inner = graph

    def forward(self, x: Tensor) -> Tensor:
        """Runs the graph and unwraps its only output."""
        only: Tensor = self.inner(x)[0].contiguous()
        return only


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

    def forward(self, cut: Tensor) -> tuple[Tensor, ...]:
        """Taps in order, then the model's floating-point outputs."""
        taps, outputs = self.tapped(cut)
        flat = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        return (*taps, *flat)


def _one_map(split: Split) -> tuple[int, int, int]:
    if len(split.latent_shapes) != 1 or len(split.latent_shapes[0]) != 3:
        shapes = ", ".join(map(str, split.latent_shapes))
        raise ConfigError(f"a learned bottleneck needs a cut crossed by one (C, H, W) map; {split.at!r} is crossed by {shapes}")
    c, h, w = split.latent_shapes[0]
    return c, h, w


def build_any(model: nn.Module, example: Tensor, config: AnyCutConfig, sample: Tensor) -> tuple[StagedModel, LearnedSplit]:
    """Teacher and untrained student around any cut.

    Args:
        model: any model.
        example: (N, 3, H, W), to trace it with.
        config: the cut and the bottleneck.
        sample: some tens of normalised photos, for the latent's first basis.

    Raises:
        ConfigError: the cut is crossed by several tensors or by no map; a match lies before the cut.
        CutError: no such cut.
    """
    cutter = Cutter(model, example)
    split = cutter.split(config.at)
    c_cut, height, _ = _one_map(split)
    known = {n.name for n in split.tail.graph.nodes}
    taps = [name for at in config.match for name in cutter.split(at).latent_names]
    if missing := [t for t in taps if t not in known]:
        raise ConfigError(f"{', '.join(missing)} are not computed by the tail: matched cuts must lie after {config.at!r}")
    stages = (TappedTail(split.tail, taps),)
    stem, body, strides, c_stem = _front(cutter, split, config, height)
    base = StagedModel(stem=stem, body=body, stages=stages, task=config.task)
    own = OwnEncoder(copy.deepcopy(body), c_cut, config.channels)
    encoders: list[nn.Module] = [own]
    tiers = [Tier(name="own", runs=((0, 1.0),))]
    if strides is not None:
        small = SmallEncoderConfig(
            channels=config.small[: len(strides)], strides=strides, kernels=(5,) * len(strides), widths=(0.5, 1.0)
        )
        encoders = [SmallEncoder(small, c_stem, config.channels), own]
        tiers = [Tier(name="s", runs=((0, 0.5),)), Tier(name="m", runs=((0, 1.0),)), Tier(name="own", runs=((1, 1.0),))]
    decoder = Decoder(config.channels, c_cut, config.width, depth=2)
    with torch.no_grad():
        cut = body(stem(sample))
        spread = principal_start(own.project, decoder.linear, cut)
        scale = float(spread.square().mean().sqrt())
    quantiser = GainQuantiser(config.channels, tuple(s * scale for s in config.steps), scale)
    return base, LearnedSplit(copy.deepcopy(stem), EncoderEnsemble(encoders, tiers), quantiser, decoder, copy.deepcopy(stages))


def _front(
    cutter: Cutter, split: Split, config: AnyCutConfig, height: int
) -> tuple[nn.Module, nn.Module, tuple[int, ...] | None, int]:
    """Stem, body, strides of a cheap encoder between them (None: none) and the stem's channels."""
    if not config.stem_at:
        return _Single(split.head), nn.Identity(), None, 0
    early: Any = cutter.split(config.stem_at)
    c_stem, h_stem, _ = _one_map(early)
    ratio = h_stem // height
    if height * ratio != h_stem or ratio & (ratio - 1) or 2 ** len(config.small) < ratio:
        raise ConfigError(
            f"the stem's map is {h_stem} high and the cut's {height}: their ratio must be 1, 2, 4 … {2 ** len(config.small)}"
        )
    halvings = ratio.bit_length() - 1
    strides = (2,) * halvings + (1,) * (1 if halvings == 0 else 0)
    return _Single(early.head), _Single(between(split.head, early.latent_names)), strides, c_stem
