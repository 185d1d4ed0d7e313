"""Inner attentions of torch itself, for comparison: FlexAttention and varlen (FlashAttention-2). Not invariant.

Both take packed rows; pages are gathered into packed rows first. What follows from a batch's offsets (block mask,
gathered slots, longest sequence where the caller doesn't say) is made in its first layer and kept as long as they are:
one wait for the device per batch, or one per layer under torch.inference_mode.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import field
from functools import cache
from inspect import signature
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import field_validator
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rlalign.modeling.inner_attention import OPTIONS

T = TypeVar("T")
_DTYPES_OF_FLASH = (torch.bfloat16, torch.float16)


class GatheredPages:
    """``paged`` by ``packed``."""

    def paged(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        block_tables: Tensor,
        cu_seqlens_q: Tensor,
        kv_lens: Tensor,
        **settings: Any,
    ) -> Tensor:
        page_size = k_cache.shape[1]
        slots, cu_seqlens_k = _of_batch(
            kv_lens, ("slots", page_size), lambda: _slots(block_tables, kv_lens, page_size), beside=block_tables
        )
        key, value = (cache.flatten(0, 1)[slots] for cache in (k_cache, v_cache))
        return self.packed(query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **settings)


@dataclass(frozen=True, config=OPTIONS)
class Flex(GatheredPages):
    """torch.nn.attention.flex_attention with a block mask of the batch."""

    invariant: ClassVar[bool] = False
    kernel_options: dict[str, int | bool | str] = field(default_factory=dict)
    """Handed to the kernel: torch.nn.attention.flex_attention.FlexKernelOptions lists them."""
    block_size: int = 128
    """Rows and keys of one entry of the block mask."""
    compile: bool = True
    """False runs torch's unfused form: every score in memory."""

    @field_validator("kernel_options")
    @classmethod
    def _known(cls, options: dict[str, int | bool | str]) -> dict[str, int | bool | str]:
        from torch.nn.attention.flex_attention import FlexKernelOptions

        known = FlexKernelOptions.__annotations__
        if unknown := sorted(options.keys() - known.keys()):
            raise ValueError(f"{unknown[0]!r} is unknown; supported: {sorted(known)}")
        return options

    @field_validator("block_size")
    @classmethod
    def _positive(cls, size: int) -> int:
        if size < 1:
            raise ValueError(f"block_size={size} is not supported; use an integer from 1 on")
        return size

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """torch says itself what it can't do: on a CPU, the backward."""

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        # the bounds save nothing here: a block mask says which blocks there are
        rows, keys = query.shape[0], key.shape[0]
        mask = _of_batch(
            cu_seqlens_q,
            (rows, keys, causal, window, self.block_size),
            lambda: self._block_mask(_Packed(cu_seqlens_q, cu_seqlens_k, rows, keys), causal, window),
            beside=cu_seqlens_k,
        )
        out = _flex(self.compile)(
            *(tensor.transpose(0, 1).unsqueeze(0) for tensor in (query, key, value)),
            score_mod=None if softcap is None else _capped(softcap, query.device),
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=self.kernel_options or None,
        )
        return out[0].transpose(0, 1)

    def _block_mask(self, batch: _Packed, causal: bool, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = batch.q_position[q] - batch.k_position[k]
            seen = batch.q_sequence[q] == batch.k_sequence[k]
            seen = seen & (distance >= 0) if causal else seen
            return seen if window is None else seen & (distance < window)

        return create_block_mask(
            visible, None, None, batch.rows, batch.keys, device=batch.q_position.device, BLOCK_SIZE=self.block_size
        )


@dataclass(frozen=True, config=OPTIONS)
class Varlen(GatheredPages):
    """torch.nn.attention.varlen.varlen_attn, which is FlashAttention-2: CUDA, 16 bit, no soft cap."""

    invariant: ClassVar[bool] = False

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda" or dtype not in _DTYPES_OF_FLASH:
            raise ValueError(
                f"attention=varlen: device={device} with dtype={dtype} is not supported; use cuda with bfloat16"
            )

    def packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        if softcap is not None:
            raise NotImplementedError(f"attention=varlen: softcap={softcap} is not supported; use None")
        if key.shape[-1] != value.shape[-1]:
            raise NotImplementedError(
                f"attention=varlen: value_dim={value.shape[-1]} differs from head_dim={key.shape[-1]}; not supported"
            )
        # both bounds count neighbours, and (-1, 0) is what torch takes for causal
        sides = (-1 if window is None else window - 1, 0 if causal else -1)
        longest = (
            _longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q,
            _longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k,
        )
        return varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, *longest, scale=scale, window_size=sides)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """torch's varlen_attn with its flag for fewer key heads than query heads.

    torch from 2.12 on refuses those without the flag; 2.11 takes them and knows no flag.
    """
    from torch.nn.attention import varlen

    grouped = query.shape[1] != key.shape[1] and "enable_gqa" in signature(varlen.varlen_attn).parameters
    flags = {"enable_gqa": True} if grouped else {}
    bounds = {"scale": scale, "window_size": window_size}
    return varlen.varlen_attn(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **bounds, **flags)


class _Packed:
    """Sequence and position of every row; queries are the last positions of their sequence."""

    def __init__(self, cu_q: Tensor, cu_k: Tensor, rows: int, keys: int) -> None:
        self.rows, self.keys = rows, keys
        self.q_sequence, q_index = _places(cu_q, rows)
        self.k_sequence, self.k_position = _places(cu_k, keys)
        self.q_position = q_index + (cu_k.diff() - cu_q.diff())[self.q_sequence]


def _places(cu_seqlens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sequence, and index within it, of each row."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.bucketize(row, cu_seqlens[1:], right=True)
    return sequence, row - cu_seqlens[sequence]


@cache
def _capped(softcap: float, device: torch.device) -> Callable[..., Tensor]:
    # a tensor: compiled for any size, a float counts as a size too, and torch 2.11 fails on that one
    cap = torch.tensor(softcap, device=device)

    def score_mod(score: Tensor, *_place: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _longest(cu_seqlens: Tensor) -> int:
    return _of_batch(cu_seqlens, "longest", lambda: int(cu_seqlens.diff().max()))


def _slots(block_tables: Tensor, kv_lens: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Cache rows of all keys, sequence after sequence; and their offsets, int32 [B + 1]."""
    offset = torch.arange(page_size, device=block_tables.device)
    slots = (block_tables.long()[:, :, None] * page_size + offset).flatten(1)
    used = torch.arange(slots.shape[1], device=slots.device) < kv_lens[:, None]
    return slots[used], torch.nn.functional.pad(kv_lens.cumsum(0), (1, 0)).to(torch.int32)


_BATCHES = WeakIdKeyDictionary()


def _of_batch(tensor: Tensor, name: object, build: Callable[[], T], *, beside: Tensor | None = None) -> T:
    """``build()``, kept as long as ``tensor`` lives; made anew when it was written to, or comes ``beside`` another.

    Whatever else it is made from is part of ``name``. Of inference tensors nothing is kept: they don't tell of writes.
    """
    beside = tensor if beside is None else beside
    if tensor.is_inference() or beside.is_inference():
        return build()
    versions = tensor._version, beside._version
    kept = _BATCHES.setdefault(tensor, {})
    found = kept.get(name)
    if found is None or found[0] != versions or found[1]() is not beside:
        # a weak reference: what is kept must not keep its own key alive
        found = kept[name] = (versions, weakref.ref(beside), build())
    return found[2]
