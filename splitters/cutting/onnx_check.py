"""Whether the torch form of an ONNX file computes what ONNX Runtime computes of the file itself.

Converters know most operators, and some of them nearly: a resize of another convention, a padding on the other side. A cut of
such a conversion would be proved against the conversion. So both are run on several pictures before anything is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.utils._pytree as pytree
from numpy.typing import NDArray
from torch import Tensor, nn

from protos.errors import ModelError, first_line
from splitters.cutting.checks import inference, one_thread
from splitters.runtime.sessions import open_session

TOLERANCE = 1e-3  # of an output's standard deviation over all pictures
FLOOR = 1e-6  # absolute: what rounding alone leaves where an output is the same everywhere
PICTURES = 4

Floats = NDArray[np.float32]


def check_conversion(path: Path, module: nn.Module, pictures: Sequence[Floats], *, said: Sequence[str] = ()) -> float:
    """Compares the two on each picture, one at a time: the file may have a fixed batch of one.

    Both run on one thread. On more, torch takes other convolutions, and what rounds differently there says nothing of the
    conversion (YOLOX-nano on pictures far darker than its own: 6e-4 of the deviation on one thread, 1.4e-3 on two).

    Args:
        path: the ONNX file, as it was given.
        module: what it was converted to.
        pictures: inputs with a batch of one; the first few are used.
        said: the converter's warnings, for the message.

    Returns:
        The largest difference over an output's standard deviation.

    Raises:
        ModelError: ONNX Runtime cannot run the file, or the outputs differ in number, shape or values.
    """
    try:
        session = open_session(path, threads=1, spinning=True, of_user=True)
        name = session.get_inputs()[0].name
        wanted = [session.run(None, {name: picture}) for picture in pictures[:PICTURES]]
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot run {path}, so its conversion cannot be checked: {first_line(error)}") from error
    with inference(module), one_thread():
        try:
            got = [_arrays(module(torch.from_numpy(picture.copy()))) for picture in pictures[:PICTURES]]
        except Exception as error:
            raise ModelError(f"{path} does not run once it is converted: {type(error).__name__}: {first_line(error)}") from error
    hint = f" (the converter warned: {'; '.join(said)})" if said else ""
    hint += "; `splitters cut` divides the file itself and needs no conversion"
    worst = 0.0
    for index, output in enumerate(session.get_outputs()):
        truth, ours = [w[index] for w in wanted], [g[index] if index < len(g) else None for g in got]
        for ours_one, truth_one in zip(ours, truth, strict=True):
            if ours_one is None or ours_one.shape != truth_one.shape:
                shape = "nothing" if ours_one is None else f"shape {ours_one.shape}"
                raise ModelError(
                    f"{path} cannot be trained or profiled: its output {output.name!r} has shape {truth_one.shape}, in torch "
                    f"{shape}{hint}"
                )
        both = np.stack([np.stack(truth), np.stack([np.asarray(o) for o in ours])]).astype(np.float64)
        gap = float(np.abs(both[0] - both[1]).max(initial=0.0))
        spread = float(both[0].std()) if both[0].size else 0.0
        if not gap <= max(TOLERANCE * spread, FLOOR):
            raise ModelError(
                f"{path} cannot be trained or profiled: in torch its output {output.name!r} differs from what ONNX Runtime "
                f"computes by {gap:.2g} ({gap / (spread or 1.0):.2g} of its standard deviation; allowed: {TOLERANCE}){hint}"
            )
        worst = max(worst, gap / spread if spread else 0.0)
    return worst


def probes(example: Tensor) -> list[Floats]:
    """Inputs of the example's shape where no photographs are at hand: noise, waves, and a large range."""
    rng = np.random.default_rng(0)
    shape = tuple(example.shape)
    waves = np.sin(np.arange(int(np.prod(shape))) * 0.37).reshape(shape)
    return [a.astype(np.float32) for a in (rng.random(shape), waves, rng.normal(0, 2, shape))]


def _arrays(output: object) -> list[Floats]:
    return [leaf.detach().numpy() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
