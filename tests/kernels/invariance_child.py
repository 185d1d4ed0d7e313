"""Run by test_plan.py under another instruction set: every product-based operator, bit by bit.

Arguments: thread counts, one after the other.
"""

from __future__ import annotations

import sys

import torch
from rlalign_kernels import attention_packed, linear, linear_logprob


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def check_linear() -> None:
    for width, depth in ((64, 128), (100, 64), (48, 500), (9, 40)):
        x, weight = torch.randn(290, depth), torch.randn(width, depth)
        whole = linear(x, weight, backend="reference")
        for start, count in ((0, 1), (5, 1), (3, 16), (7, 33), (11, 100), (20, 260)):
            part = linear(x[start : start + count], weight, backend="reference")
            assert equal(part, whole[start : start + count]), (width, depth, start, count)


def check_attention() -> None:
    for dims in (32,):
        lengths = torch.tensor([70, 3, 130, 1, 64, 9])
        cu = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
        q, k, v = (torch.randn(int(cu[-1]), heads, dims) for heads in (4, 2, 2))
        args = {"scale": 0.2, "backend": "reference"}
        whole = attention_packed(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, **args)
        for b, length in enumerate(lengths.tolist()):
            rows = slice(int(cu[b]), int(cu[b + 1]))
            for count in {length, 1, (length + 1) // 2}:
                last = slice(rows.stop - count, rows.stop)
                cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (count, length))
                part = attention_packed(q[last], k[rows], v[rows], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **args)
                assert equal(part, whole[last]), (dims, b, count)


def check_vocab() -> None:
    hidden, weight = torch.randn(70, 64), torch.randn(1100, 64)
    targets = torch.randint(0, 1100, (70,))
    whole = linear_logprob(hidden, weight, targets, backend="reference")
    for rows in (slice(0, 1), slice(9, 26), slice(1, 70)):
        part = linear_logprob(hidden[rows], weight, targets[rows], backend="reference")
        assert equal(part.logprob, whole.logprob[rows]) and equal(part.entropy, whole.entropy[rows]), rows


if __name__ == "__main__":
    torch.manual_seed(0)
    for threads in map(int, sys.argv[1:]):
        torch.set_num_threads(threads)
        with torch.no_grad():
            for name, check in (("linear", check_linear), ("attention", check_attention), ("vocab", check_vocab)):
                check()
                print(name)
