"""Any model, cut in two, and the proof that the two halves are the same function.

>>> split = splitters.split(model, "layer2", torch.rand(1, 3, 224, 224))
>>> split.verify(images).relative_difference
0.0
>>> result = split.tail(*split.head(images))

The cut's interface is the set of live tensors: whatever was computed before the cut and is needed after it. In a
residual network that can be two, between dense blocks many. Latents are batch-first; both halves take any batch size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from splitters.cutting.graph.partition import Cut, Partitioner
from splitters.cutting.graph.trace import Method, TensorInfo, flat_inputs, trace, trace_program
from splitters.cutting.graph.verify import Verification, verify


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A model cut in two.

    Attributes:
        head: (inputs…) → tuple of latents, each batch-first.
        tail: (latents…) → what the model returns, nested as the model nests it.
        at: the cut's name.
        latent_names: names of the tensors that cross, of the graph nodes that compute them.
        latent_shapes: their shapes without the batch axis.
        method: ``export`` or ``fx``, which made the graph.
        notes: why a better method, or a free batch size, was not possible; empty when all is well.
        dynamic_batch: whether any batch size works; else only the example's.
    """

    head: fx.GraphModule = field(repr=False)
    tail: fx.GraphModule = field(repr=False)
    at: str
    latent_names: tuple[str, ...]
    latent_shapes: tuple[tuple[int, ...], ...]
    method: Method
    notes: tuple[str, ...]
    dynamic_batch: bool
    model: nn.Module = field(repr=False)

    def verify(self, inputs: Any, *, tolerance: float = 1e-4) -> Verification:
        """Compares head ∘ tail with the model on different pictures, alone and in one batch, and shows that each latent matters.

        Args:
            inputs: like the example inputs; any batch size if the batch is dynamic. Where they hold fewer than three different
                pictures, others are made of the first.
            tolerance: largest difference allowed, in standard deviations of the output.

        Raises:
            CutError: the difference is larger; the model mixes the pictures of a batch or remembers them; or replacing some
                latent moves the output by no more than ten tolerances.
        """
        return verify(
            self.model, self.head, self.tail, inputs,
            names=self.latent_names, at=self.at, dynamic_batch=self.dynamic_batch, tolerance=tolerance,
        )  # fmt: skip


class Cutter:
    """One traced model, to be cut at several places without tracing it again.

    Args:
        model: a module, used in evaluation mode, or an exported program; its weights are shared with the halves, not copied.
        example_inputs: a tensor or tuple of tensors with the batch axis first; the batch size does not matter.
        method: ``export`` or ``fx`` alone; by default whichever works, torch.export first.

    Raises:
        CutError: the model does not run on the example, or no graph can be made of it.
    """

    def __init__(self, model: nn.Module | ExportedProgram, example_inputs: Any, *, method: Method | None = None) -> None:
        self.example = flat_inputs(example_inputs)
        if isinstance(model, ExportedProgram):
            self.trace = trace_program(model, example_inputs)
            self.model: nn.Module = model.module()
        else:
            self.trace = trace(model, example_inputs, method=method)
            self.model = model
        self.partitioner = Partitioner(self.trace)

    def candidates(self) -> tuple[Cut, ...]:
        """All cuts at the ends of submodules, in order."""
        return self.partitioner.candidates()

    def split(self, at: str | Cut) -> Split:
        """Cuts after the submodule (or graph node) ``at``.

        Raises:
            CutError: no such cut; names those nearby.
        """
        cut = self.partitioner.find(at) if isinstance(at, str) else at
        head, tail = self.partitioner.divide(cut)
        infos = [self.trace.values[n][0] for n in cut.crossing]
        return Split(
            head=head, tail=tail, at=cut.name, model=self.model, method=self.trace.method, notes=self.trace.notes,
            latent_names=tuple(n.name for n in cut.crossing),
            latent_shapes=tuple(i.shape[1:] for i in infos if isinstance(i, TensorInfo)),
            dynamic_batch=self.trace.dynamic_batch,
        )  # fmt: skip


def split(model: nn.Module | ExportedProgram, at: str, example_inputs: Any, *, method: Method | None = None) -> Split:
    """Cuts ``model`` after its submodule ``at`` into a head for the device and a tail for the server.

    Args:
        model: any module whose graph torch.export or torch.fx can make, or an exported program.
        at: dotted name of a submodule (``layer2``, ``blocks.3.0``) or of a node of the graph.
        example_inputs: a tensor or tuple of tensors, batch axis first.
        method: ``export`` or ``fx`` alone; by default whichever works, torch.export first.

    Raises:
        CutError: the model does not run on the example, has no graph, or has no cut of that name.
    """
    return Cutter(model, example_inputs, method=method).split(at)
