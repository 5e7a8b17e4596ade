"""What is checked before a model is traced, so that the message names the module and the way out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from protos.errors import CutError, HeadtailError, first_line

OnStep = Callable[[int, int, str], None]
"""Told how many of how many steps are done, and what is done next."""


def silent(done: int, total: int, told: str) -> None:
    """Nobody wants to know."""


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:  # not model.eval(), which the modules of exported programs refuse
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread inside; as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ModuleTracker:
    """Knows which submodule is running, so that an exception can be blamed on the innermost one."""

    def __init__(self, model: nn.Module) -> None:
        self._stack: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
        self._handles = []
        for name, module in model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda m, args, name=name: self._stack.append((name, m, args))),
                module.register_forward_hook(lambda _m, _args, _out: (self._stack.pop(), None)[1]),
            ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def where(self) -> str:
        """The innermost running module, with its type and the shapes it was given."""
        if not self._stack:
            return "the model itself"
        name, module, args = self._stack[-1]
        shapes = ", ".join(str(tuple(a.shape)) for a in args if isinstance(a, Tensor))
        who = f"module {name!r}" if name else "the model itself"
        return f"{who} ({type(module).__name__}, input {shapes or 'without tensors'})"


def check_devices(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """One device for all parameters, buffers and inputs.

    Raises:
        CutError: two differ; names the first parameter that is elsewhere.
    """
    wanted = inputs[0].device
    for number, tensor in enumerate(inputs[1:], start=1):
        if tensor.device != wanted:
            raise CutError(f"example input {number} is on {tensor.device}, input 0 on {wanted}; move them to one device")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != wanted:
            owner = name.rpartition(".")[0]
            raise CutError(
                f"module {owner!r} has its {name.rpartition('.')[2]!r} on {tensor.device}, the example input is on {wanted}; "
                f"call model.to({str(wanted)!r}) or move the example"
            )


def run_model(model: nn.Module, inputs: Sequence[Any]) -> Any:
    """Runs the model as it is, on copies of the inputs: it may change them in place.

    Raises:
        CutError: it fails on this input; names the module that failed and the shape it was given.
    """
    with ModuleTracker(model) as tracker, inference(model):
        try:
            return model(*(x.clone() if isinstance(x, Tensor) else x for x in inputs))
        except HeadtailError:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in inputs if isinstance(x, Tensor))
            raise CutError(
                f"the model does not run on the example input {shapes}: {tracker.where()} raised {type(error).__name__}: "
                f"{first_line(error)}; give an example of the shape the model is used with"
            ) from error
