"""New keys and values into the pages that ``attention_paged`` reads: data movement, bit for bit on every backend."""

from __future__ import annotations

import torch

from rlalign_kernels.checks import check_same
from rlalign_kernels.dispatch import Backend, Implementations, operator


def _index_copy(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    k_cache.flatten(0, 1).index_copy_(0, slots, key)
    v_cache.flatten(0, 1).index_copy_(0, slots, value)


def _triton(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    from rlalign_kernels.attention import triton_cache  # triton may be missing where nobody asks for it

    triton_cache.write(key, value, k_cache, v_cache, slots)


_WRITE = Implementations("write_kv_cache", reference=_index_copy, native=_index_copy, triton=_triton)


@operator
def write_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    slot_mapping: torch.Tensor,
    backend: Backend,
) -> None:
    """Copy key [T, Hkv, D] and value [T, Hkv, Dv] into contiguous caches [pages, page, Hkv, D] and [.., Dv], in place.

    slot_mapping int64 [T]: page · page size + offset of each token. With backend "triton" nothing is read on the host,
    and a token whose slot lies outside of the caches is left out; the others raise IndexError, or what CUDA makes of
    it. Of tokens that share a slot any one may win. Not differentiable.
    Raises ValueError for shapes, dtypes or devices that do not fit, NotImplementedError where a gradient is wanted.
    """
    run = _WRITE[backend]
    check_same("write_kv_cache", key, value=value, k_cache=k_cache, v_cache=v_cache)
    for name, new, cache in (("k_cache", key, k_cache), ("v_cache", value, v_cache)):
        if new.dim() != 3 or cache.dim() != 4 or cache.shape[2:] != new.shape[1:] or not cache.is_contiguous():
            raise ValueError(
                f"write_kv_cache: {name} {tuple(cache.shape)}, strides {cache.stride()}; expected contiguous "
                f"[pages, page, heads, dim] for rows {tuple(new.shape)}"
            )
    if k_cache.shape[:2] != v_cache.shape[:2]:
        raise ValueError(
            f"write_kv_cache: k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} differ in pages"
        )
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != key.shape[:1] or len(value) != len(key):
        raise ValueError(
            f"write_kv_cache: slot_mapping is {slot_mapping.dtype} {tuple(slot_mapping.shape)}, expected torch.int64 "
            f"[{len(key)}], the tokens of key {tuple(key.shape)} and value {tuple(value.shape)}"
        )
    if slot_mapping.device != key.device:
        raise ValueError(f"write_kv_cache: slot_mapping.device={slot_mapping.device} differs from key's {key.device}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (key, value, k_cache, v_cache)):
        raise NotImplementedError("write_kv_cache: has no gradient; use torch.no_grad()")
    run(key, value, k_cache, v_cache, slot_mapping)
