"""Hugging Face decoders on our operators: one policy, two callers."""

from rlalign.modeling.align import align, backend_for
from rlalign.modeling.audit import AuditError, AuditReport, Finding, audit
from rlalign.modeling.checksum import checksum_tensors
from rlalign.modeling.context import AttentionCall, AttentionContext, PackedContext, PagedContext
from rlalign.modeling.eos import eos_ids
from rlalign.modeling.hf_attention import register_attention
from rlalign.modeling.inner_attention import InnerAttention, make_inner_attention, refuse_contradiction
from rlalign.modeling.loading import as_policy, load_model, load_policy, load_tokenizer, save_checkpoint
from rlalign.modeling.policy import KVShape, Policy, hash_tensors
from rlalign.modeling.sampling_rows import rows_of, sampling_arrays, sampling_rows
from rlalign.modeling.tiny import make_tiny_model

__all__ = [
    "AttentionCall",
    "AttentionContext",
    "AuditError",
    "AuditReport",
    "Finding",
    "InnerAttention",
    "KVShape",
    "PackedContext",
    "PagedContext",
    "Policy",
    "align",
    "as_policy",
    "audit",
    "backend_for",
    "checksum_tensors",
    "eos_ids",
    "hash_tensors",
    "load_model",
    "load_policy",
    "load_tokenizer",
    "make_inner_attention",
    "make_tiny_model",
    "refuse_contradiction",
    "register_attention",
    "rows_of",
    "sampling_arrays",
    "sampling_rows",
    "save_checkpoint",
]
