"""A small sweep of the output layer's kernels, for compute-sanitizer: see test_memcheck.py."""

from __future__ import annotations

import torch
from rlalign_kernels import linear_logprob, linear_sample
from support_attention import DEVICE, heavy
from test_vocab import make_rows, mixed_rows, problem

# rows, ids, hidden size
SWEEP = ((1, 1, 64), (17, 33, 100), (65, 257, 64), (193, 5003, 136))


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for num_rows, vocab, depth in SWEEP:
            hidden, weight, targets = problem(num_rows, vocab, depth, dtype)
            inputs = [x.requires_grad_() for x in (hidden, weight, heavy((vocab,), dtype, 3))]
            rows = make_rows(num_rows, temperature=0.6, truncates=False)
            out = linear_logprob(
                *inputs[:2], targets, bias=inputs[2], softcap=5.0, rows=rows, backend="triton"
            )  # fmt: skip
            torch.autograd.grad((out.logprob, out.entropy), inputs, [torch.randn(num_rows, device=DEVICE)] * 2)
            seeds = torch.arange(num_rows, device=DEVICE)
            for drawn_from in (rows, mixed_rows(num_rows)):
                drawn = linear_sample(
                    *inputs[:2], rows=drawn_from, seeds=seeds, positions=seeds, raw_logprobs=True, backend="triton"
                )  # fmt: skip
                linear_logprob(*inputs[:2], drawn.token, rows=drawn_from, return_support=True, backend="triton")
    torch.cuda.synchronize()
    print("swept")


if __name__ == "__main__":
    main()
