"""A small sweep of norms, rotary embedding and activations, for compute-sanitizer: see test_memcheck.py."""

from __future__ import annotations

import torch
from rlalign_kernels import apply_rotary, geglu, layer_norm, rms_norm, rotary_cos_sin, silu, swiglu, write_kv_cache
from support_attention import DEVICE, heavy

# rows x columns: no multiple of any tile, a tile to the last row, more rows than programs
SHAPES = ((1, 1), (3, 127), (1537, 128), (1025, 768), (1030, 1024), (67, 2561), (5, 5120), (2, 12801), (3, 16384))


def main() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, size in SHAPES:
            x, residual = (heavy((rows, size), dtype, seed).requires_grad_() for seed in (1, 2))
            weight, bias = (heavy((size,), dtype, seed).requires_grad_() for seed in (3, 4))
            out, total = rms_norm(x, weight, eps=1e-6, residual=residual, backend="triton")
            centred = layer_norm(x, weight, bias, eps=1e-6, backend="triton")
            torch.autograd.backward([out, total, centred], [torch.randn_like(t) for t in (out, total, centred)])
        for heads, dim, rotated in ((5, 80, 20), (2, 128, 128)):
            x = heavy((33, heads + 2, dim), dtype, 5)[:, 1:-1].requires_grad_()
            caches = [torch.zeros(5, 16, heads, dim, dtype=dtype, device=DEVICE) for _ in range(2)]
            slots = torch.arange(79, 46, -1, device=DEVICE)
            write_kv_cache(x.detach(), x.detach(), *caches, slot_mapping=slots, backend="triton")
            frequencies = torch.rand(rotated // 2, device=DEVICE)
            cos, sin = rotary_cos_sin(torch.arange(33, device=DEVICE), frequencies, dtype=dtype, backend="triton")
            query, key = apply_rotary(x, x[:, :1], cos, sin, backend="triton")
            torch.autograd.backward([query, key], [torch.randn_like(t) for t in (query, key)])
        gate, up = (heavy((67, 1003), dtype, seed).requires_grad_() for seed in (6, 7))
        pair = swiglu(gate, up, backend="triton"), geglu(gate, up, approximate="tanh", backend="triton")
        torch.autograd.backward([*pair, silu(gate, backend="triton")], [torch.randn_like(gate) for _ in range(3)])
    torch.cuda.synchronize()
    print("swept")


if __name__ == "__main__":
    main()
