"""``attn_implementation="rlalign"``: our attention in any model of transformers' interface, and nothing else of ours.

    from rlalign.modeling import register_attention
    register_attention()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="rlalign")

A row's bits then depend on that row alone: padded, packed or by itself, prefilled or decoded. The operators around it
stay the model's own; ``align`` replaces those too. docs/attention.md says what is supported.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from rlalign_kernels import Backend, attention_packed
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from rlalign.modeling.hf_mask import (
    Rule,
    check_totals,
    is_packed,
    mask_offsets,
    position_starts,
    starts_to_offsets,
    tokens_beside,
    unpack,
    whole_rows,
)

NAME = "rlalign"

# Keywords of a forward that cannot change this result: positions and caches have been applied by then, and our
# backward is always deterministic. Whatever is not listed could matter, and is refused.
_HARMLESS = frozenset(
    {
        "position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits",
        "num_items_in_batch", "return_dict", "logits_to_keep", "deterministic",
    }
)  # fmt: skip


def register_attention(backend: Backend | None = None) -> None:
    """Make ``attn_implementation="rlalign"`` known to transformers, with its mask function. Needs no GPU and no triton.

    backend: "triton" (CUDA), "reference" or "native"; None takes "triton" for CUDA tensors, "reference" for CPU
    tensors, and refuses any other device. A later call replaces the backend, for models in use too.
    """
    if backend is not None and backend not in get_args(Backend):
        raise ValueError(f"register_attention: backend={backend!r} is unknown; supported: {get_args(Backend)} or None")

    @torch.compiler.disable  # its kernels are compiled already: a compiled forward breaks its graph here
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return _attention(*args, backend=backend, **kwargs)

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask_offsets)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: Backend | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [B, Hq, T, D], key [B, Hkv, L, D], value [B, Hkv, L, Dv] → ([B, T, Hq, Dv], None).

    ``attention_mask``: of ``mask_offsets``, bool or 0/1 [B, L], or None. Rows and keys that are padding give 0 and get
    no gradient. ``s_aux`` [Hq]: a logit per head that takes its share of every row ("triton" only).
    Raises ValueError or NotImplementedError naming whatever it would otherwise have to ignore.
    """
    _refuse(module, dropout, others, packed_by_caller=cu_seq_lens_q is not None)
    batch, _, q_length, head_dim = query.shape
    kv_length = key.shape[2]
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        cu_q, cu_k = _given_offsets(batch, attention_mask, cu_seq_lens_q, cu_seq_lens_k)
        rule = _rule(module, attention_mask, is_causal)
        longest = (max_length_q, max_length_k)
    else:
        if attention_mask is None or not is_packed(attention_mask):
            rule = _rule(module, None, is_causal)
            attention_mask = _offsets(attention_mask, batch, q_length, kv_length, rule, query.device)
        check_totals(attention_mask, batch * q_length, batch * kv_length)
        rule = _rule(module, attention_mask, is_causal)
        packed = None
        if q_length == kv_length > 1 and not rule.packed:
            packed = _packed_by_position(attention_mask, others.get("position_ids"), rule, batch, q_length)
        cu_q, cu_k = unpack(attention_mask)[:2] if packed is None else (packed, packed)
        longest = (q_length, kv_length)
    out = attention_packed(
        *(tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        scale=head_dim**-0.5 if scaling is None else scaling,
        causal=rule.causal,
        window=_window(rule, sliding_window),
        softcap=softcap,
        sinks=s_aux,
        max_seqlen_q=_host(longest[0]),
        max_seqlen_k=_host(longest[1]),
        backend=backend or _backend_of(query.device),
    )
    return out.unflatten(0, (batch, q_length)), None


def _refuse(module: nn.Module, dropout: float, others: dict[str, Any], *, packed_by_caller: bool) -> None:
    if dropout > 0.0:
        raise ValueError(f"dropout={dropout}: attention dropout is not supported, set attention_dropout=0 in the model")
    harmless = _HARMLESS | {"seq_idx"} if packed_by_caller else _HARMLESS
    for name, value in sorted(others.items()):
        # by identity: 0 equals False but may mean something, and a tensor has no truth value
        if name not in harmless and value is not None and value is not False:
            hint = " (align() makes a model take one)" if name == "attention_context" else ""
            raise ValueError(
                f"{type(module).__name__} passes {name}=… to attention: attn_implementation='rlalign' does not support "
                f"it{hint}"
            )


def _backend_of(device: torch.device) -> Backend:
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"attn_implementation='rlalign': device={device} is not supported; use cuda or cpu")
    return "triton" if device.type == "cuda" else "reference"


def _rule(module: nn.Module, mask: Tensor | None, is_causal: bool | None) -> Rule:
    """The mask's rule, where there is one; else what the caller says, else the module."""
    if mask is None or not is_packed(mask):
        return Rule(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    rule = unpack(mask)[2]
    if is_causal is not None and is_causal != rule.causal:
        raise ValueError(
            f"is_causal={is_causal} in {type(module).__name__} contradicts the mask that the model asked for "
            f"(causal={rule.causal})"
        )
    return rule


def _offsets(
    mask: Tensor | None, batch: int, q_length: int, kv_length: int, rule: Rule, device: torch.device
) -> Tensor:
    """Where transformers called no mask function: offsets of what the model handed down, queries being the last."""
    if mask is None:
        return whole_rows(batch, q_length, kv_length, rule, device)
    if mask.shape != (batch, kv_length):
        raise ValueError(
            f"attention_mask.shape={tuple(mask.shape)}: attn_implementation='rlalign' takes masks of two dimensions, "
            f"here {(batch, kv_length)}"
        )
    return mask_offsets(
        batch,
        q_length,
        kv_length,
        kv_length - q_length,
        mask_function=causal_mask_function if rule.causal else bidirectional_mask_function,
        attention_mask=mask,
        device=device,
    )


def _given_offsets(batch: int, mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[Tensor, Tensor]:
    if cu_q is None or cu_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k belong together: give both or none")
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q with a batch of {batch} rows: packed sequences are one row")
    if mask is not None and (not is_packed(mask) or unpack(mask)[2].padded):
        raise ValueError("cu_seq_lens_q and attention_mask: both say where sequences are; give one")
    return cu_q, cu_k


def _packed_by_position(
    mask: Tensor, position_ids: Tensor | None, rule: Rule, batch: int, length: int
) -> Tensor | None:
    """Offsets int32 [n + 1] of the sequences that position ids tell apart, or None if each row is one.

    transformers looks for them in a forward without cache only. Read from the device in the first layer of a mask, for
    all that share it; a model that asks for no mask has a new one in each layer.
    Raises ValueError if they do so within a padded row: mask and positions then disagree about what a sequence is.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return None
    if not hasattr(mask, "rlalign_found"):
        starts = position_starts(position_ids).expand(batch, -1)
        if rule.padded and bool((starts & tokens_beside(mask, batch, length)).any()):
            raise ValueError(
                "position_ids: they do not ascend by one along the tokens that attention_mask shows in a row; packed "
                "sequences take no padding, and a padded row is one sequence"
            )
        several = not rule.padded and bool(starts.any())
        mask.rlalign_found = starts_to_offsets(starts).to(torch.int32) if several else None
    return mask.rlalign_found


def _window(rule: Rule, sliding_window: int | None) -> int | None:
    if sliding_window is not None and rule.window not in (None, sliding_window):
        raise ValueError(f"sliding_window={sliding_window} contradicts the mask's window of {rule.window}")
    window = rule.window if sliding_window is None else sliding_window
    if window is not None and not rule.causal:
        raise NotImplementedError(f"sliding_window={window} with is_causal=False: only causal windows are supported")
    return window


def _host(length: int | Tensor | None) -> int | None:
    """A bound that is on the device is left out: it only saves work, and reading it would wait."""
    return length if isinstance(length, int) else None
