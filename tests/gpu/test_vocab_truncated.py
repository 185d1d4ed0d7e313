"""What truncated rows keep on the GPU: two numbers a row, which say what a mask of all ids would, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import linear_logprob, linear_sample
from support_attention import DEVICE, bits
from test_vocab import MIB, mixed_rows, problem

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@DTYPES
def test_a_cut_gives_the_bits_of_its_mask(dtype):
    """Log-probs, entropies and gradients, by what a row keeps and by the same as bool [T, V]; some rows keep all."""
    hidden, weight, _ = problem(300, 5003, 256, dtype)
    rows, seeds = mixed_rows(300), torch.arange(300, device=DEVICE) * 31
    targets = linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=seeds, backend="triton").token
    mask = linear_logprob(hidden, weight, targets, rows=rows, return_support=True, backend="triton").support
    assert not mask[rows.truncated].all() and mask[~rows.truncated].all()
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    cotangents = [torch.randn(300, device=DEVICE) for _ in range(2)]
    found = []
    for support in (None, mask):
        out = linear_logprob(*inputs, targets, rows=rows, support=support, backend="triton")
        assert out.logprob.isfinite().all()
        grads = torch.autograd.grad((out.logprob, out.entropy), inputs, cotangents)
        found.append([bits(x.detach()) for x in (out.logprob, out.entropy, out.logsumexp, *grads)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_equal_logits_at_the_cut_keep_the_lowest_ids():
    """Every logit twice, V/2 apart: top-k of an odd number takes the pair's first."""
    hidden, half, _ = problem(40, 500, 64)
    weight = torch.cat((half, half))
    rows = mixed_rows(40)
    kept = linear_logprob(hidden, weight, torch.zeros(40, dtype=torch.int64, device=DEVICE), rows=rows,
                          return_support=True, backend="triton").support  # fmt: skip
    odd = (rows.top_k % 2 == 1) & (rows.top_p == 1) & (rows.min_p == 0) & rows.truncated
    assert odd.any()
    assert torch.equal(kept[odd].sum(1), rows.top_k[odd])
    assert not (kept[:, 500:] & ~kept[:, :500]).any()


def test_memory_is_bounded_under_filters():
    """At 8,192 rows a bool of all ids would be 1.2 GiB, and be kept for the gradient."""
    from rlalign_kernels.vocab.triton_gradient import MOST_BYTES
    from rlalign_kernels.vocab.triton_support import MOST_SORTING_BYTES

    hidden, weight, targets = problem(8192, 151936, 512)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    rows = mixed_rows(8192)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_logprob(*inputs, targets, rows=rows, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < MOST_SORTING_BYTES + 300 * MIB
    assert torch.cuda.memory_allocated() - before < 2 * MIB
    cotangent = torch.where(out.logprob.isfinite(), 1.0, 0.0)
    torch.autograd.grad(out.entropy, inputs, cotangent)
    own = sum(x.numel() * x.element_size() for x in inputs)
    assert torch.cuda.max_memory_allocated() - before < own + MOST_BYTES + 32 * MIB
