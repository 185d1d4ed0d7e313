"""Validation and layouts shared by packed and paged attention."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from numbers import Integral, Real
from operator import index

import numpy as np
import torch

from rlalign_kernels.checks import check_dtype, check_same
from rlalign_kernels.content import cached
from rlalign_kernels.reference.attention import MAX_HEAD_DIM, MAX_ITEMS, MAX_SCORES, products
from rlalign_kernels.reference.attention_backward import Settings
from rlalign_kernels.reference.attention_layout import Layout, Problem, build_layout

_KEY_SHAPES = {"attention_packed": "[S, Hkv, D]", "attention_paged": "[pages, page, Hkv, D]"}
_MAY_BE_ABSENT = ("key_mask", "sinks")


def check_heads(operator: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str) -> None:
    """q [T, Hq, D], k [..., Hkv, D], v [..., Hkv, Dv] of one dtype and device, Hq a multiple of Hkv, D <= 256."""
    check_dtype(operator, backend, q=q)
    check_same(operator, q, k=k, v=v)
    if k.dim() != (3 if operator == "attention_packed" else 4):
        raise ValueError(f"{operator}: keys have shape {tuple(k.shape)}; expected {_KEY_SHAPES[operator]}")
    if q.dim() != 3 or k.shape[:-1] != v.shape[:-1] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{operator}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if k.dim() == 4 and k.shape[1] == 0:
        raise ValueError(f"{operator}: k_cache {tuple(k.shape)} has pages of 0 tokens")
    if k.shape[-2] == 0 or q.shape[1] % k.shape[-2]:
        raise ValueError(f"{operator}: {q.shape[1]} query heads are not a multiple of {k.shape[-2]} key heads")
    for name, size in (("head_dim", q.shape[-1]), ("value_dim", v.shape[-1])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise NotImplementedError(f"{operator}: {name}={size} is not supported; 1 to {MAX_HEAD_DIM} are")


def refuse_what_is_no_tensor(operator: str, **arguments: object) -> None:
    """Raises ValueError naming the first argument that is no tensor; for a call that has failed.

    Asked of every call it would cost time; asked afterwards it costs none.
    """
    for name, value in arguments.items():
        absent = value is None and name in _MAY_BE_ABSENT
        if not absent and not isinstance(value, torch.Tensor):
            raise ValueError(f"{operator}: {name}={reprlib.repr(value)} is not supported; use a tensor") from None


def bound(name: str, value: int | None) -> int | None:
    """A length that no sequence exceeds. A tensor is read, which waits for its device."""
    if value is None or (type(value) is int and value >= 0):
        return value
    try:
        length = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        length = -1
    if length < 0:
        raise ValueError(f"attention: {name}={value!r} is not supported; use None or an integer from 0 on")
    return length


def check_settings(operator: str, scale: float, causal: bool, window: int | None, softcap: float | None) -> None:
    """Raises ValueError naming the setting that is out of bounds."""
    if causal is not True and causal is not False:
        raise ValueError(f"{operator}: causal={causal!r} is not supported; use True or False")
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise ValueError(f"{operator}: scale={scale!r} is not supported; it must be a finite number")
    if window is not None and (not isinstance(window, Integral) or isinstance(window, bool) or window < 1):
        raise ValueError(f"{operator}: window={window!r} is not supported; use None or an integer from 1 on")
    if softcap is not None and (not isinstance(softcap, Real) or not 0 < softcap < math.inf):
        raise ValueError(f"{operator}: softcap={softcap!r} is not supported; use None or a finite value > 0")


def check_sinks(operator: str, sinks: torch.Tensor | None, q: torch.Tensor, backend: str) -> None:
    """Attention sinks [Hq], a logit per head, are the triton backend's alone so far."""
    if sinks is None:
        return
    if backend != "triton":
        raise NotImplementedError(f"{operator}: sinks are not there with backend={backend!r}; use 'triton'")
    if sinks.shape != q.shape[1:2] or sinks.device != q.device or not sinks.is_floating_point():
        raise ValueError(
            f"{operator}: sinks are {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}; "
            f"expected floating point [{q.shape[1]}] on q's device"
        )


def check_problem(
    operator: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    backend: str,
    bounds: tuple[int | None, int | None],
) -> None:
    """What every backend refuses, of keys that are packed or on pages. ``bounds``: max_seqlen_q and max_seqlen_k."""
    bound("max_seqlen_q", bounds[0])
    bound("max_seqlen_k", bounds[1])
    check_heads(operator, q, k, v, backend)
    check_settings(operator, settings.scale, settings.causal, settings.window, settings.softcap)
    check_sinks(operator, settings.sinks, q, backend)
    mask = settings.key_mask
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:1]):
        raise ValueError(f"{operator}: key_mask is {mask.dtype} {tuple(mask.shape)}; expected bool [S]")


def check_offsets(operator: str, name: str, offsets: torch.Tensor) -> None:
    """Raises ValueError unless ``offsets`` is int [B + 1]; its content is not looked at."""
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(
            f"{operator}: {name} is {offsets.dtype} {tuple(offsets.shape)}; expected int32 or int64 [B + 1]"
        )


def host_offsets(operator: str, name: str, offsets: torch.Tensor, total: int) -> np.ndarray:
    """Cumulative lengths [B + 1] as int64 on the host. Raises ValueError unless they rise from 0 to ``total``."""
    check_offsets(operator, name, offsets)
    values = offsets.cpu().numpy().astype(np.int64)
    if values[0] != 0 or values[-1] != total or (np.diff(values) < 0).any():
        raise ValueError(f"{operator}: {name} must rise from 0 to {total}; got {values.tolist()[:8]}...{values[-1]}")
    return values


def layout_of(
    key: tuple[object, ...],
    problem: Callable[[], Problem],
    q: torch.Tensor,
    num_kv_heads: int,
    value_dim: int,
    causal: bool,
    window: int | None,
) -> Layout:
    """Cached layout of a batch; ``key`` names its content, ``problem`` states it if it is new."""
    proven = products(q.shape[2], value_dim)
    full = (*key, q.shape[1], num_kv_heads, causal, window, proven, q.device)

    def build() -> Layout:
        return build_layout(
            problem(),
            num_q_heads=q.shape[1],
            num_kv_heads=num_kv_heads,
            causal=causal,
            window=window,
            row_counts=proven.row_counts(q.shape[1] // num_kv_heads),
            key_widths=proven.key_widths,
            max_scores=MAX_SCORES,
            max_items=MAX_ITEMS,
            device=q.device,
        )

    return cached(full, build)
