"""Scaled dot-product attention over ragged batches: packed (training, prefill) and paged (rollout).

``out = softmax(cap(scale q k^T) + mask) v``. Queries of a sequence are its last q_len positions (bottom-right aligned).
Shapes: q [T, Hq, D]; packed k [S, Hkv, D], v [S, Hkv, Dv]; paged caches [pages, page, Hkv, D] and [.., Dv]. Hq is a
multiple of Hkv; query head h reads key head h // (Hq / Hkv). dtypes: float32, bfloat16 and, but for reference, float16;
everything inside is float32.
Promised: forward, a query row's bits depend on that row and the keys it may see: packed and paged, whole and chunked
give the same bits, where a sequence's own keys and values are finite. A row that sees no key is 0, its lse -inf (with
sinks: its sink). Backward (packed) is deterministic run to run.
"""

from __future__ import annotations

from rlalign_kernels.attention.cache import write_kv_cache
from rlalign_kernels.attention.flash_api import flash_attn_varlen_func
from rlalign_kernels.attention.packed import attention_packed
from rlalign_kernels.attention.paged import attention_paged

__all__ = ["attention_packed", "attention_paged", "flash_attn_varlen_func", "write_kv_cache"]
