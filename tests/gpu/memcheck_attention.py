"""A small sweep of attention's kernels, for compute-sanitizer: see test_memcheck.py."""

from __future__ import annotations

import torch
from rlalign_kernels import attention_packed, attention_paged
from support_attention import Problem, offsets

SWEEP = (
    Problem([1, 17, 130, 300], heads=(4, 2), settings={"window": 100}),
    Problem([1, 17, 130, 300], heads=(6, 2), dims=(64, 64), dtype=torch.float16),
    Problem([5, 300], heads=(5, 1), dims=(80, 48), settings={"softcap": 20.0}, sinks=True),
    Problem([33, 70], heads=(2, 1), dims=(64, 64), dtype=torch.float32),
    Problem([2200, 300], heads=(4, 2)),
    Problem([129, 64], heads=(8, 1), dims=(64, 64), settings={"window": 128}, sinks=True),
)


def main() -> None:
    for p in SWEEP:
        inputs = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
        out, _ = attention_packed(*inputs, cu_seqlens_q=p.cu, cu_seqlens_k=p.cu, **p.keywords)
        out.backward(torch.randn_like(out))
        for page in (16, 128):
            cache = p.cache(page)
            for count in (1, 5):
                taken, index = p.last([count] * len(p.lengths))
                attention_paged(p.q[index], **cache, cu_seqlens_q=offsets(taken), **p.keywords)
    torch.cuda.synchronize()
    print("swept")


if __name__ == "__main__":
    main()
