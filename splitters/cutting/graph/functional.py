"""In-place operators made functional, so that a tensor has one value wherever the graph is cut."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_REGIONS = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}  # and where the body is among the arguments
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_assert_not_none")


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _is_view(node: fx.Node) -> bool:
    schema = _schema(node)
    if schema is None:
        return node.op == "call_function"  # a python function, getitem among them: may alias
    return any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)


def make_functional(graph: fx.Graph) -> bool:
    """Replaces ``relu_(x)`` by ``relu(x)``, and x by the result from there on.

    That is right as long as no view shares x's memory. Where one may, nothing is promised: the caller
    must use torch.export's own, slower functionalisation.

    Returns:
        Whether the graph is functional now.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        schema = _schema(node)
        if schema is None or not schema.is_mutable:
            continue
        target = node.args[0] if node.args else None
        written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        plain = _functional_twin(node)
        if plain is None or len(written) != 1 or not isinstance(target, fx.Node) or target.op != "call_function":
            return False
        # An activation in place on a linear or convolution's output: the target may neither be nor have a view.
        if _is_view(target) or any(_is_view(user) for user in target.users if place[user] < place[node]):
            return False
        node.target = plain
        for user in [u for u in target.users if place[u] > place[node]]:
            user.replace_input_with(target, node)
    return True


def _functional_twin(node: fx.Node) -> Any:
    """``aten.relu.default`` for ``aten.relu_.default``; None where there is none of the same arguments."""
    namespace, _, name = str(_schema(node).name).partition("::")
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    twin = getattr(packet, node.target._overloadname, None)  # type: ignore[union-attr]  # noqa: SLF001
    if twin is None or twin._schema.is_mutable:  # noqa: SLF001
        return None
    return twin if [a.name for a in twin._schema.arguments] == [a.name for a in _schema(node).arguments] else None  # noqa: SLF001


def inline_regions(module: fx.GraphModule) -> None:
    """Puts the nodes of switched-off autocast and of gradient-mode regions in place of the region.

    torch.export keeps such regions as calls of a submodule, into which no cut could fall.

    Raises:
        ValueError: a region computes in lower precision; that cannot be flattened without changing the result.
    """
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name not in _REGIONS:
            continue
        if name == "wrap_with_autocast" and node.args[2]:
            raise ValueError("the model switches autocast on inside; trace it without")
        body_node, *arguments = node.args[_REGIONS[name] :]
        body = module.get_submodule(str(body_node.target))
        if not isinstance(body, fx.GraphModule):
            raise TypeError(f"the region {body_node.target} is no graph")
        env: dict[fx.Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), arguments, strict=True))
        result: Any = None
        with module.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "output":
                    result = fx.map_arg(inner.args[0], env.__getitem__)
                elif inner.op == "get_attr":
                    path = f"{str(body_node.target).replace('.', '_')}_{str(inner.target).replace('.', '_')}"
                    if not hasattr(module, path):
                        setattr(module, path, operator.attrgetter(str(inner.target))(body))
                    env[inner] = module.graph.get_attr(path)
                elif inner.op != "placeholder":
                    env[inner] = module.graph.node_copy(inner, env.__getitem__)
        if isinstance(result, fx.Node):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):
                user.replace_all_uses_with(result[user.args[1]])
                module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.recompile()


def drop_write_backs(graph: fx.Graph) -> None:
    """Removes what a functional graph writes back at its end, into an input or a buffer that the model changed in place.

    An input is the caller's own copy, and what a buffer remembers may not matter (`verify` refuses models that remember).
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node.target is torch.ops.aten.copy_.default and not node.users:
            into = node.args[0]
            if isinstance(into, fx.Node) and into.op in {"placeholder", "get_attr"}:
                graph.erase_node(node)


def drop_checks(graph: fx.Graph) -> None:
    """Removes assertions about shapes and types, which belong to the whole graph's inputs, and dead nodes."""
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", str(node.target))
        dead = node.op == "get_attr" and not node.users
        if dead or (node.op == "call_function" and not node.users and any(check in name for check in _CHECKS)):
            graph.erase_node(node)
    graph.eliminate_dead_code()
