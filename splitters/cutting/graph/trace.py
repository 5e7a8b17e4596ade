"""A model as a flat graph, by torch.export or, where that fails, torch.fx; both end in the same :class:`Trace`."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from protos.errors import CutError, first_line
from splitters.cutting.checks import ModuleTracker, check_devices, inference, run_model
from splitters.cutting.graph.functional import drop_checks, drop_write_backs, inline_regions, make_functional

Method = Literal["export", "fx"]
_CHECK_BATCH = 3


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is remembered of a tensor: its shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A model's graph, in the order in which it computes.

    Attributes:
        module: the whole graph; its inputs and outputs are flat.
        order: the nodes that compute (no inputs, weights or output), in order.
        out_spec: how the flat outputs are nested in the model's own output.
        method: what made the graph.
        notes: why a better method was not used, a sentence each.
        dynamic_batch: whether the graph serves any batch size; else only the example's.
        batches: the batch sizes with which ``values`` were found: two, or one without a dynamic batch.
        values: of every node, its value at each batch size, tensors as :class:`TensorInfo`.
        ends: the number of nodes after which each submodule (by its dotted path) is done.
    """

    module: fx.GraphModule
    order: tuple[fx.Node, ...]
    out_spec: pytree.TreeSpec
    method: Method
    notes: tuple[str, ...]
    dynamic_batch: bool
    batches: tuple[int, ...]
    values: Mapping[fx.Node, tuple[Any, ...]]
    ends: Mapping[str, int]


def flat_inputs(example_inputs: Any) -> tuple[Tensor, ...]:
    """The tensors of an example: one tensor, or a (nested) tuple of them.

    Raises:
        CutError: none, something that is no tensor, or no batch axis.
    """
    inputs = tuple(pytree.tree_leaves(example_inputs))
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(sorted({type(x).__name__ for x in inputs})) or "nothing"
        raise CutError(f"example_inputs must be one tensor or a tuple of tensors, got {kinds}")
    if inputs[0].ndim == 0 or inputs[0].shape[0] == 0:
        raise CutError(f"example_inputs need a batch axis first, got shape {tuple(inputs[0].shape)}")
    return inputs


def rebatch(inputs: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """Copies of the inputs at another batch size: images repeat in turn; inputs without the batch axis stay."""
    size = inputs[0].shape[0]
    index = torch.arange(batch) % size
    return tuple(x[index.to(x.device)] if x.ndim and x.shape[0] == size else x.clone() for x in inputs)


def trace(model: nn.Module, example_inputs: Any, *, method: Method | None = None) -> Trace:
    """Traces ``model`` for inference.

    Args:
        model: runs on the example; its training mode is left as it was.
        example_inputs: a tensor or a tuple of tensors, batch axis first, any batch size.
        method: ``export`` or ``fx`` alone; by default export, then fx, then strict export, which reads the Python code and so
            gets by some checks of shapes, then export with a fixed batch.

    Raises:
        CutError: the model does not run on the example or cannot be traced; names the module and the way out.
    """
    given = flat_inputs(example_inputs)
    check_devices(model, given)
    run_model(model, given)
    notes: list[str] = []
    attempts: list[tuple[Method, bool, bool]] = [
        ("export", True, False), ("fx", True, False), ("export", True, True), ("export", False, False),
    ]  # fmt: skip
    for kind, dynamic, strict in attempts:
        if method is not None and kind != method:
            continue
        batches = (2, _CHECK_BATCH) if dynamic else (given[0].shape[0],)
        with ModuleTracker(model) as tracker, inference(model), _quiet():
            try:
                here = rebatch(given, batches[0])
                module, out_spec = _by_fx(model) if kind == "fx" else _by_export(model, here, dynamic=dynamic, strict=strict)
                return _finish(module, out_spec, given, batches, kind, tuple(notes))
            except Exception as error:  # noqa: BLE001  (tracers raise anything; each reason is kept and told)
                how = f"torch.{kind}" + (" (strict)" if strict else "") + ("" if dynamic else " with a fixed batch size")
                notes.append(f"{how} failed in {tracker.where()}: {type(error).__name__}: {first_line(error)}")
    raise CutError(
        "the model cannot be traced to a graph. " + ". ".join(notes) + ". Control flow that depends on tensor values "
        "must become torch.where or torch.cond, or stay outside: cut the submodule that has none (split(model.backbone, ...))"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the tracers print of their own: pages of graphs, which the one sentence of a note stands for."""
    talker = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        talker.setLevel(level)


def _by_export(
    model: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: bool, strict: bool
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    size = inputs[0].shape[0]
    batch = torch.export.Dim("batch", min=1, max=4096)
    each = tuple({0: batch} if x.ndim and x.shape[0] == size else {} for x in inputs)
    # The parameters that have a name take one spec each; what is beyond them lands in *args, whose entry is a tuple of specs.
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    named = sum(k in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for k in kinds)
    variadic = inspect.Parameter.VAR_POSITIONAL in kinds and len(inputs) > named
    shapes: Any = (*each[:named], each[named:]) if variadic else each
    return _of_program(torch.export.export(model, inputs, dynamic_shapes=shapes if dynamic else None, strict=strict))


def trace_program(program: torch.export.ExportedProgram, example_inputs: Any) -> Trace:
    """Takes the graph of an exported program; its batch is as dynamic as it was exported.

    Raises:
        CutError: the program does not run on the example.
    """
    given = flat_inputs(example_inputs)
    first = next((n.meta.get("val") for n in program.graph.nodes if n.name in program.graph_signature.user_inputs), None)
    dynamic = isinstance(first, Tensor) and isinstance(first.shape[0], torch.SymInt)
    batches = (2, _CHECK_BATCH) if dynamic else (given[0].shape[0],)
    note = () if dynamic else (f"the program was exported with a fixed batch of {batches[0]}",)
    try:
        module, out_spec = _of_program(program)
        with torch.no_grad():
            return _finish(module, out_spec, given, batches, "export", note)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in given)
        raise CutError(
            f"the exported program does not run on the example {shapes}: {first_line(error)}; it was exported for "
            f"{tuple(first.shape) if isinstance(first, Tensor) else 'other inputs'}"
        ) from error


def _of_program(program: torch.export.ExportedProgram) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    if not make_functional(program.graph):
        program = program.run_decompositions({})
    accepts = inspect.signature(program.module).parameters
    module = program.module(check_guards=False) if "check_guards" in accepts else program.module()
    if not isinstance(module, fx.GraphModule):
        raise TypeError("torch.export returned no graph module")
    inline_regions(module)
    drop_write_backs(module.graph)
    drop_checks(module.graph)
    spec = program.call_spec.out_spec
    if spec is None:
        raise TypeError("torch.export returned no output specification")
    return module, spec


def _by_fx(model: nn.Module) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    module = fx.symbolic_trace(model)
    output = next(n for n in module.graph.nodes if n.op == "output")
    leaves, spec = pytree.tree_flatten(output.args[0])
    output.args = (tuple(leaves),)
    for node in module.graph.nodes:
        if node.op == "call_module":
            path = str(node.target)
            parts = path.split(".")
            node.meta["nn_module_stack"] = {".".join(parts[:i]): (".".join(parts[:i]), None) for i in range(1, len(parts) + 1)}
    return module, spec


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps of every node its value, tensors as their shapes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = pytree.tree_map(lambda v: TensorInfo(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v, value)
        return value


def _finish(
    module: fx.GraphModule,
    out_spec: pytree.TreeSpec,
    given: tuple[Tensor, ...],
    batches: tuple[int, ...],
    method: Method,
    notes: tuple[str, ...],
) -> Trace:
    _gather_items(module.graph)
    module.recompile()
    seen = []
    for batch in batches:
        recorder = _Recorder(module)
        recorder.run(*rebatch(given, batch), enable_io_processing=False)
        seen.append(recorder.seen)
    _check_batches_apart(module.graph, seen)
    order = tuple(n for n in module.graph.nodes if n.op not in {"placeholder", "get_attr", "output"})
    ends: dict[str, int] = {}
    for position, node in enumerate(order, start=1):
        for entry in node.meta.get("nn_module_stack", {}).values():
            if entry[0]:
                ends[str(entry[0])] = position
    return Trace(
        module=module, order=order, out_spec=out_spec, method=method, notes=notes, dynamic_batch=len(batches) > 1,
        batches=batches, values={n: tuple(s[n] for s in seen) for n in module.graph.nodes}, ends=ends,
    )  # fmt: skip


def holds_tensors(value: Any) -> bool:
    """Whether a recorded value is, or holds, a tensor."""
    return any(isinstance(leaf, TensorInfo) for leaf in pytree.tree_leaves(value))


def data_nodes(graph: fx.Graph, value: Callable[[fx.Node], Any]) -> set[fx.Node]:
    """Nodes with tensors that depend on an input's values; sizes and what follows from sizes alone do not."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computed = node.op not in {"placeholder", "get_attr", "output"} and holds_tensors(value(node))
        if node.op == "placeholder" or (computed and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def _check_batches_apart(graph: fx.Graph, seen: Sequence[Mapping[fx.Node, Any]]) -> None:
    """Refuses a graph that runs at any batch size but folds the images of a batch into one result.

    Raises:
        CutError: an output that depends on the images has the same shape at two batch sizes.
    """
    output = next(n for n in graph.nodes if n.op == "output")
    found = data_nodes(graph, seen[0].__getitem__)
    for node in output.all_input_nodes:
        shapes = {leaf.shape for values in seen for leaf in pytree.tree_leaves(values[node]) if isinstance(leaf, TensorInfo)}
        if len(seen) > 1 and node in found and len(shapes) == 1:
            raise CutError(f"the output {node.name} has shape {shapes.pop()} at any batch size: the images of a batch are mixed")


def _gather_items(graph: fx.Graph) -> None:
    """Moves each ``getitem`` right behind the node it takes an item of, so that no cut falls between them."""
    for node in list(graph.nodes):
        items = [u for u in node.users if u.op == "call_function" and u.target is operator.getitem and u.all_input_nodes == [node]]
        for item in reversed(items):
            node.append(item)
    graph.lint()
