"""Activation and product of an MLP as one operator, where its code is ``down_proj(act_fn(gate_proj(x)) * up_proj(x))``.

The code is traced, not tried: numbers would not show a clamp that none of them reaches, or a factor that is 1 today.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from rlalign_kernels import Backend
from torch import fx, nn

from rlalign.modeling import layers

_LINEARS = ("gate_proj", "up_proj", "down_proj")


def align_gates(model: nn.Module, backend: Backend) -> None:
    """Every such MLP of ``model``, in place; its linears and activation are aligned before."""
    for module in model.modules():
        linears = all(isinstance(module._modules.get(name), layers.AlignedLinear) for name in _LINEARS)
        activation = isinstance(module._modules.get("act_fn"), layers.AlignedSiLU | layers.AlignedGELU)
        if linears and activation and "forward" not in vars(module) and _is_gated(module):
            layers.become(module, layers.AlignedGatedMLP, backend)


def _is_gated(module: nn.Module) -> bool:
    """Whether that is all it computes, in training and out of it."""
    before = module.training
    try:
        for module.training in (True, False):
            if not _computes_gate(_Calls().trace(module)):
                return False
    except Exception:  # code that can't be traced is another
        return False
    finally:
        module.training = before
    return True


class _Calls(fx.Tracer):
    """Sees the calls of submodules, not what they compute."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _computes_gate(graph: fx.Graph) -> bool:
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1 or len(nodes) != 7:
        return False
    gate, up = (_call(graph, name, inputs[0]) for name in ("gate_proj", "up_proj"))
    activated = _call(graph, "act_fn", gate)
    product = next((n for n in nodes if n.op == "call_function" and n.target in (operator.mul, torch.mul)), None)
    if None in (gate, up, activated, product) or product.kwargs or set(product.args) != {activated, up}:
        return False
    down = _call(graph, "down_proj", product)
    return down is not None and nodes[-1].op == "output" and nodes[-1].args == (down,)


def _call(graph: fx.Graph, name: str, argument: Any) -> fx.Node | None:
    """The call of a submodule with this argument alone."""
    found = (n for n in graph.nodes if n.op == "call_module" and n.target == name)
    return next((n for n in found if n.args == (argument,) and not n.kwargs), None)
