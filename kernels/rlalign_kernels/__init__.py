"""Operators whose bits do not depend on the batch: torch and, lazily, triton; nothing of RL.

Every operator takes ``backend``: "reference" (invariant PyTorch), "native" (whatever PyTorch picks, for comparison),
"triton" (GPU). docs/operators has a page for each.
"""

from __future__ import annotations

from rlalign_kernels.activation import geglu, gelu, silu, swiglu
from rlalign_kernels.attention import attention_packed, attention_paged, flash_attn_varlen_func, write_kv_cache
from rlalign_kernels.conformance import CONFORMANCE, Conformance
from rlalign_kernels.dispatch import BACKENDS, Backend, running_operator
from rlalign_kernels.layer_norm import layer_norm
from rlalign_kernels.linear import linear
from rlalign_kernels.linear_logprob import linear_logprob
from rlalign_kernels.norm import rms_norm
from rlalign_kernels.plan import Fingerprint, Plan, fingerprint
from rlalign_kernels.probe import probe
from rlalign_kernels.rope import apply_rotary, rotary_cos_sin
from rlalign_kernels.rows import LogprobOutput, SampleOutput, SamplingRows
from rlalign_kernels.sampling import linear_sample
from rlalign_kernels.sweep import sweep

__all__ = [
    "BACKENDS",
    "Backend",
    "CONFORMANCE",
    "Conformance",
    "Fingerprint",
    "LogprobOutput",
    "Plan",
    "SampleOutput",
    "SamplingRows",
    "apply_rotary",
    "attention_packed",
    "attention_paged",
    "fingerprint",
    "flash_attn_varlen_func",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_logprob",
    "linear_sample",
    "probe",
    "rms_norm",
    "rotary_cos_sin",
    "running_operator",
    "silu",
    "sweep",
    "swiglu",
    "write_kv_cache",
]
