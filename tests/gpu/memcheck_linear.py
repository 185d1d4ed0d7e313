"""A small sweep of linear's kernels under every schedule, for compute-sanitizer: see test_memcheck.py."""

from __future__ import annotations

import torch
from rlalign_kernels.gemm.schedules import hopper_available
from test_linear import FLOAT32, HOPPER, STOCK, heavy, wide

# rows, N, K, dtype: no multiples of a tile; the copy engine takes the first two
SWEEP = (
    (130, 1000, 520, torch.bfloat16),
    (3, 264, 136, torch.float16),
    (70, 333, 777, torch.bfloat16),
    (70, 129, 77, torch.float32),
)


def main() -> None:
    hopper = hopper_available(torch.cuda.get_device_capability())
    for num_rows, width, depth, dtype in SWEEP:
        sizes = ((num_rows, depth), (width, depth), (width,))
        x, weight, bias = (heavy(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes))
        boxes = depth % 8 == 0 and width % 4 == 0
        schedules = FLOAT32 if dtype == torch.float32 else [tile for tile in STOCK if boxes or not tile.tma]
        for tile in [*schedules, *(HOPPER if hopper and boxes else [])]:
            wide(x, weight, bias, schedule=tile)
        for leaves in (n for n in (1, 2, 4, 8) if depth % n == 0):
            wide(x, weight, bias, leaves=leaves)
    torch.cuda.synchronize()
    print("swept")


if __name__ == "__main__":
    main()
