"""Rotary position embedding: tables of cos and sin, and their application.

``angle = position * inv_freq``; tables repeat the D/2 angles twice and are scaled by ``attention_scaling``.
``apply_rotary``: with a head = [a, b, rest] (halves of the rotated R channels), [a cos - b sin, b cos + a sin, rest],
each multiplication and addition rounded in the tables' dtype, as in the models it serves: on the same tables every
backend has the same bits. dtypes: float32, bfloat16 and, but for reference, float16.
Promised: forward, bits depend on position and element only. Backward is the transposed rotation, deterministic.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from rlalign_kernels.checks import check_dtype, check_same, dtypes, in_words
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.reference.elementwise import elementwise


def _angles(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    return position_ids.to(torch.float32).unsqueeze(-1) * inv_freq


def _tables(cos: torch.Tensor, sin: torch.Tensor, scaling: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat((half, half), -1).mul_(scaling).to(dtype) for half in (cos, sin))


def _reference_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    angles = _angles(position_ids, inv_freq)
    return _tables(elementwise("cos", angles), elementwise("sin", angles), scaling, dtype)


def _native_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    angles = _angles(position_ids, inv_freq)
    return _tables(angles.cos(), angles.sin(), scaling, dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Multiplications, additions and signs only: correctly rounded in any layout, hence reference and native alike."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    out = turned * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)
    out = out.to(x.dtype)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


def _rotate_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Transpose of the rotation: the sine of each output's own channel travels back with it."""
    turned, rest = grad[..., : cos.shape[-1]], grad[..., cos.shape[-1] :]
    first, second = (turned * sin.unsqueeze(1)).chunk(2, -1)
    out = turned * cos.unsqueeze(1) + torch.cat((second, -first), -1)
    out = out.to(grad.dtype)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return _native(query, key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(
        ctx, grad_query: torch.Tensor, grad_key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_back(grad_query, cos, sin), _rotate_back(grad_key, cos, sin), None, None


def _native(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _reference(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return _Rotary.apply(query, key, cos, sin) if wanted else _native(query, key, cos, sin)


def _triton_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    from rlalign_kernels.elementwise import triton_rotary  # triton may be missing where nobody asks for it

    return triton_rotary.tables(position_ids, inv_freq, scaling, dtype)


def _triton(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from rlalign_kernels.elementwise import triton_rotary

    return triton_rotary.apply(query, key, cos, sin)


_TABLES = Implementations("rotary_cos_sin", reference=_reference_tables, native=_native_tables, triton=_triton_tables)
_APPLY = Implementations("apply_rotary", reference=_reference, native=_native, triton=_triton)


@operator
def rotary_cos_sin(
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    attention_scaling: float = 1.0,
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [..., D] in ``dtype``, of integer position_ids [...] and float32 inv_freq [D/2].

    Raises ValueError for another dtype of any of them.
    """
    run = _TABLES[backend]
    if position_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rotary_cos_sin: position_ids.dtype={position_ids.dtype}; supported: int32, int64")
    if inv_freq.dtype != torch.float32 or inv_freq.dim() != 1:
        raise ValueError(
            f"rotary_cos_sin: inv_freq is {inv_freq.dtype} {tuple(inv_freq.shape)}; expected float32 [D/2]"
        )
    if dtype not in dtypes(backend):
        raise ValueError(f"rotary_cos_sin: dtype={dtype} is not supported; use {in_words(dtypes(backend))}")
    return run(position_ids, inv_freq, float(attention_scaling), dtype)


@operator
def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R channels of query [T, Hq, D] and key [T, Hkv, D] by tables cos, sin [T, R].

    Tables are in the heads' dtype or in float32. Differentiable in query and key. All backends have the same bits;
    an element errs by at most 1.01 eps (|a cos| + |b sin|), eps the tables' dtype's, and where that is wider than the
    heads' by one unit in its last place more.
    Raises ValueError for shapes or dtypes that do not fit, or R odd or larger than D; NotImplementedError for tables
    that require gradients, but with "native".
    """
    run = _APPLY[backend]
    check_dtype("apply_rotary", backend, query=query)
    if backend != "native" and torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise NotImplementedError("apply_rotary: cos and sin have no gradient; detach them")
    check_same("apply_rotary", query, key=key)
    tables = query if cos.dtype == query.dtype else cos
    check_same("apply_rotary", tables, cos=cos, sin=sin)
    if cos.dtype not in (query.dtype, torch.float32) or cos.device != query.device:
        raise ValueError(
            f"apply_rotary: cos is {cos.dtype} on {cos.device}; supported: {query.dtype} or torch.float32 on "
            f"{query.device}"
        )
    tokens, dims = (cos.shape[0], sin.shape[0], key.shape[0]), (query.dim(), key.dim(), cos.dim())
    if dims != (3, 3, 2) or cos.shape != sin.shape or set(tokens) != {query.shape[0]} or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"apply_rotary: query {tuple(query.shape)}, key {tuple(key.shape)}, cos {tuple(cos.shape)}, sin "
            f"{tuple(sin.shape)} do not fit"
        )
    if cos.shape[1] % 2 or cos.shape[1] > query.shape[2]:
        raise ValueError(f"apply_rotary: {cos.shape[1]} rotated channels; supported: even and at most {query.shape[2]}")
    return run(query, key, cos, sin)
