"""The inner attention as a config object: what computes softmax(q kᵀ) v in an aligned model. docs/attention.md.

One frozen dataclass each; ``conf/attention/<name>.yaml`` names it by ``_target_`` and mirrors its options. They meet
contexts (modeling/context.py) at one seam: rows are (tokens, heads, head_dim) packed, key heads are shared by head
count, scale, causality and window are explicit, dropout does not exist. Legend: T query rows, S key rows, B sequences.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Protocol

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from rlalign_kernels import Backend, attention_packed, attention_paged
from torch import Tensor

from rlalign.config import Numerics

OPTIONS = ConfigDict(extra="forbid", strict=True)


class InnerAttention(Protocol):
    """``invariant``: a row's bits depend on that row alone, which numerics=invariant needs."""

    invariant: ClassVar[bool]

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises ValueError where it can't run, before anything runs."""

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
        """query [T, Hq, D], key [S, Hkv, D], value [S, Hkv, Dv] → [T, Hq, Dv], differentiable.

        cu_seqlens_*: int32 [B + 1]. A sequence's queries are its last positions; one at i sees keys j <= i if causal,
        and j > i - window. max_seqlen_*: no sequence has more queries or keys; they save work and change no bit.
        """

    def paged(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        block_tables: Tensor,
        cu_seqlens_q: Tensor,
        kv_lens: Tensor,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """The same against caches [pages, page, Hkv, D or Dv]; no gradient. block_tables int32 [B, max_pages], entries
        beyond kv_lens int32 [B] mean nothing."""


class OperatorAttention:
    """Attention by the operators of rlalign_kernels, which validate their arguments."""

    backend: ClassVar[Backend]

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        """They run anywhere, unless a subclass says otherwise."""

    def packed(self, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        return attention_packed(query, key, value, **settings, backend=self.backend)

    def paged(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, **settings: Any) -> Tensor:
        return attention_paged(query, k_cache, v_cache, **settings, backend=self.backend)


@dataclass(frozen=True, config=OPTIONS)
class Invariant(OperatorAttention):
    """Our Triton kernels: one plan for packed rows, pages and their gradient. CUDA."""

    invariant: ClassVar[bool] = True
    backend: ClassVar[Backend] = "triton"

    def check(self, device: torch.device, dtype: torch.dtype) -> None:
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"attention=invariant: device={device} is not supported, use cuda or attention=reference")


@dataclass(frozen=True, config=OPTIONS)
class Reference(OperatorAttention):
    """Our PyTorch operators on fixed tiles: any device, what a CPU run uses by default."""

    invariant: ClassVar[bool] = True
    backend: ClassVar[Backend] = "reference"


@dataclass(frozen=True, config=OPTIONS)
class Sdpa(OperatorAttention):
    """torch's scaled_dot_product_attention over padded batches, as ordinary engines do; soft caps are computed in full.

    What numerics=native uses by default.
    """

    invariant: ClassVar[bool] = False
    backend: ClassVar[Backend] = "native"


def default_attention(backend: Backend) -> InnerAttention:
    """What the operators of ``backend`` come with. Raises ValueError for a name that is none."""
    own = {"triton": Invariant, "reference": Reference, "native": Sdpa}
    if backend not in own:
        raise ValueError(f"backend={backend!r} is unknown; supported: {sorted(own)}")
    return own[backend]()


def make_inner_attention(settings: Mapping[str, Any]) -> InnerAttention:
    """The object that ``settings`` describe: ``_target_`` names the class, the rest are its options.

    Raises ValueError for a class that isn't there, and for an option that it does not have or value it does not take.
    """
    target = settings.get("_target_")
    module, _, name = str(target).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"attention._target_={target!r}: no such class ({error})") from error
    if missing := [method for method in ("check", "packed", "paged", "invariant") if not hasattr(found, method)]:
        raise ValueError(f"attention._target_={target!r}: an inner attention has {missing[0]!r}, see docs/attention.md")
    options = {name: value for name, value in settings.items() if name != "_target_"}
    try:
        return found(**options)
    except TypeError as error:  # pydantic's own errors are ValueErrors already
        raise ValueError(f"attention: {error}") from error


def refuse_contradiction(attention: InnerAttention, numerics: Numerics) -> None:
    """Raises ValueError if ``attention`` would break what ``numerics`` promises."""
    if numerics == "invariant" and not attention.invariant:
        raise ValueError(
            f"attention={type(attention).__name__}: its bits depend on the batch, which contradicts "
            "numerics=invariant; use attention=invariant or attention=reference, or numerics=native"
        )
