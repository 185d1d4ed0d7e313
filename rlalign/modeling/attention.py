"""The attention function that aligned models call: transformers' interface on one side, a context on the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from rlalign.modeling.context import AttentionCall, AttentionContext

# not "rlalign", which is register_attention()'s: an aligned model needs no mask, so transformers must know no mask
# function for this name
ATTENTION_NAME = "rlalign_context"

# Keywords that models pass along and that cannot change the result here: positions are applied by then, caches and
# masks are the context's business, routers are no part of attention. Whatever is not listed could matter, and is
# refused.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "is_causal"}
)


def context_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    attention_context: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over packed rows.

    query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] → ([1, T, Hq, Dv], None).
    Raises ValueError for whatever this function would otherwise have to ignore.
    """
    if attention_context is None:
        raise ValueError(
            f"attention_context=None in {type(module).__name__}: an aligned model is called with packed rows and a "
            "context (rlalign.modeling.PackedContext, or Policy.hidden), padded batches unpacked first; a decoder that "
            "doesn't hand the context on to this module is not supported, with any numerics"
        )
    if attention_mask is not None:
        raise ValueError("attention_mask is given: an aligned model takes its mask from attention_context alone")
    if dropout > 0.0:
        raise ValueError(f"dropout={dropout}: attention dropout is not supported, set attention_dropout=0 in the model")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError(f"is_causal=False in {type(module).__name__}: only causal decoders are supported")
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {unknown[0]}=… to attention, which may change its result: not supported, "
            "with any numerics"
        )
    if query.shape[0] != 1:
        raise ValueError(f"query.shape={tuple(query.shape)}: rows are packed, the batch dimension must be 1")
    call = AttentionCall(
        layer=module.layer_idx,
        backend=module.rlalign_backend,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        attention=module.rlalign_attention,
    )
    # squeezed, not indexed: an index's gradient would be written into zeros
    rows = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return attention_context.attend(*rows, call).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, context_attention)
