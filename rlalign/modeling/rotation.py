"""Rotary embeddings applied by our operator: one launch, where a model's own arithmetic takes ten.

Transformers' attention modules rotate queries and keys in the midst of their forward, by ``apply_rotary_pos_emb`` of
the file that they stand in. An aligned one runs the same code with that name bound to ``apply_rotary``, where both have
the same bits; elsewhere (a CPU, interleaved channels, other conventions) it stays as it is, element-wise and exact.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from itertools import product
from types import FunctionType

import torch
from rlalign_kernels import Backend, apply_rotary
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.modeling import layers

_NAME = "apply_rotary_pos_emb"
_PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]
_Rotate = Callable[..., tuple[Tensor, Tensor]]


def align_rotation(model: PreTrainedModel, backend: Backend) -> None:
    """Every attention module of ``model`` whose rotation is ours, in place. Rotary tables are aligned before."""
    tables = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if not tables or not all(isinstance(module, layers.AlignedRotary) for module in tables):
        return
    dtype = model.dtype
    table_dtype = dtype if all(module.rlalign_cast for module in tables) else torch.float32
    rotating: dict[Callable[..., object], type[layers.AlignedModule]] = {}
    for module in model.modules():
        if not hasattr(module, "layer_idx") or (theirs := _rotation_of(module)) is None:
            continue
        forward = type(module).forward
        if forward not in rotating and _same(theirs, dtype, table_dtype):
            rotating[forward] = _rotating(forward, backend)
        if forward in rotating:
            layers.become(module, rotating[forward], backend)


def _rotation_of(module: nn.Module) -> _Rotate | None:
    """The function that its forward rotates with; None where there is none of that name and parameters."""
    forward = type(module).forward
    if "forward" in vars(module) or not inspect.isfunction(forward) or _NAME not in forward.__code__.co_names:
        return None
    found = forward.__globals__.get(_NAME)
    if not inspect.isfunction(found) or list(inspect.signature(found).parameters) != _PARAMETERS:
        return None
    return found


def _same(theirs: _Rotate, dtype: torch.dtype, table_dtype: torch.dtype) -> bool:
    """Whether both rotate random heads to the same bits, all of their channels and half of them."""
    generator = torch.Generator().manual_seed(2)
    ours = _rotate_by("native")
    for rotated, heads_axis in product((16, 8), (1, 2)):
        query, key = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (4, 2))
        # of many sizes: nothing may depend on that
        query, key = (x.mul(10.0 ** torch.randint(-4, 5, x.shape, generator=generator)).to(dtype) for x in (query, key))
        if heads_axis == 2:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        tables = [torch.randn(1, 5, rotated, generator=generator).to(table_dtype) for _ in range(2)]
        try:
            expected = theirs(query, key, *tables, heads_axis)
        except Exception:  # whatever it raises: it may take whole heads only
            if rotated == 16:
                return False
            continue
        found = ours(query, key, *tables, heads_axis)
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return False
    return True


@cache
def _rotate_by(backend: Backend) -> _Rotate:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """q [B, Hq, T, D], k [B, Hkv, T, D], cos and sin [B or 1, T, R]; heads behind T with unsqueeze_dim=2."""
        if unsqueeze_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        batch = q.shape[:2]
        tables = (x.expand(*batch, -1).flatten(0, 1) for x in (cos, sin))
        turned = apply_rotary(q.flatten(0, 1), k.flatten(0, 1), *tables, backend=backend)
        q, k = (x.unflatten(0, batch) for x in turned)
        return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)

    return apply_rotary_pos_emb


def _rotating(forward: FunctionType, backend: Backend) -> type[layers.AlignedModule]:
    """A class whose forward is that code, with our rotation in it, and all other names as they are now."""
    names = {**forward.__globals__, _NAME: _rotate_by(backend)}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__, ours.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    return type("AlignedAttention", (layers.AlignedModule,), {"forward": ours})
