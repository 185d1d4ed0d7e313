"""Forward over the logits: a program per tile of rows and ids, which leaves a few numbers per row and block of ids.

Fields of ``parts`` float32 [fields, blocks, rows]: scoring (m, s, w), sampling (m, s, noisy maximum, its id's bits, its
logit) and with RAW (m, s) of temperature 1 without noise and before the cut.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.vocab.triton_tiles import (
    LOG2E,
    ZERO_EXP,
    block_maximum,
    blocks,
    cut_off,
    exponents,
    noise,
    restrict,
    row_scale,
    rows_and_logits,
    spread,
    tree,
    tree_dot,
)


@triton.jit
def _scan_block(
    x, block, offs_m, c, greedy, mask_ptr, limit_ptr, last_ptr, seeds_ptr, positions_ptr, parts_ptr, num_rows, num_ids,
    stride_mask, M: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CUT: tl.constexpr,
    RAGGED: tl.constexpr, CLAMP: tl.constexpr, SAMPLE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Logits x [M, BLOCK] of one block."""
    num_blocks = tl.cdiv(num_ids, BLOCK)
    field = num_blocks.to(tl.int64) * num_rows
    ptrs = parts_ptr + block.to(tl.int64) * num_rows + offs_m
    inside = offs_m < tl.where(block < num_blocks, num_rows, 0)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = restrict(x, offs_m, ids, mask_ptr, num_rows, num_ids, stride_mask, HAS_MASK, RAGGED)
    everything = x
    if HAS_CUT:
        x = cut_off(x, offs_m, ids, limit_ptr, last_ptr, num_rows, 0)
    m = block_maximum(x, c)
    d = exponents(x, c, m, M, BLOCK)
    p = tl.math.exp2(d)
    tl.store(ptrs, m, mask=inside)
    tl.store(ptrs + field, tree(p, M, BLOCK), mask=inside)
    if not SAMPLE:
        if CLAMP:
            d = tl.maximum(d, ZERO_EXP)
        tl.store(ptrs + 2 * field, tree_dot(p, d, M, BLOCK), mask=inside)
    else:
        seed = tl.load(seeds_ptr + offs_m, mask=offs_m < num_rows, other=0)
        position = tl.load(positions_ptr + offs_m, mask=offs_m < num_rows, other=0)
        added = noise(seed, position, block, M, BLOCK)
        noisy = tl.where(greedy[:, None], x, tl.fma(x, spread(c, M, BLOCK), added))
        best = tl.max(noisy, 1)
        # a row of NaN has no best id
        drawn = tl.min(tl.where(noisy == best[:, None], ids[None, :], 0x7FFFFFFF), 1)
        logit = tl.max(tl.where(ids[None, :] == drawn[:, None], x, float("-inf")), 1)
        tl.store(ptrs + 2 * field, best, mask=inside)
        tl.store(ptrs + 3 * field, drawn.to(tl.float32, bitcast=True), mask=inside)
        tl.store(ptrs + 4 * field, logit, mask=inside)
        if RAW:
            one = tl.full([M], LOG2E, tl.float32)
            m = block_maximum(everything, one)
            p = tl.math.exp2(exponents(everything, one, m, M, BLOCK))
            tl.store(ptrs + 5 * field, m, mask=inside)
            tl.store(ptrs + 6 * field, tree(p, M, BLOCK), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def scan_kernel(
    hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, temperature_ptr, mask_ptr, limit_ptr, last_ptr, seeds_ptr,
    positions_ptr, parts_ptr, num_rows, num_ids, depth, stride_hidden, stride_weight, stride_mask, cap, num_programs,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr, ROW_TILES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CUT: tl.constexpr, RAGGED: tl.constexpr,
    SAMPLE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(num_ids, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=FLATTEN):
        offs_m, id_tile, x = rows_and_logits(
            tile, hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, num_rows, num_ids, depth, stride_hidden,
            stride_weight, cap, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, ROW_TILES, HAS_BIAS, HAS_CAP,
        )  # fmt: skip
        c, greedy = row_scale(temperature_ptr, offs_m, num_rows, HAS_TEMPERATURE)
        CLAMP: tl.constexpr = HAS_BIAS or HAS_MASK or HAS_CUT or RAGGED
        parts = blocks(x, BLOCK_M, BLOCK_N, BLOCK)
        for i in tl.static_range(BLOCK_N // BLOCK):
            _scan_block(
                parts[i], id_tile * (BLOCK_N // BLOCK) + i, offs_m, c, greedy, mask_ptr, limit_ptr, last_ptr,
                seeds_ptr, positions_ptr, parts_ptr, num_rows, num_ids, stride_mask, BLOCK_M, BLOCK, HAS_MASK, HAS_CUT,
                RAGGED, CLAMP, SAMPLE, RAW,
            )  # fmt: skip
