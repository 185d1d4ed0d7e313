"""write_kv_cache: every backend moves the same bits, into the slots asked for and nowhere else."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import write_kv_cache
from support_kernels import interpreted, normal, same_bits

BACKENDS = ["reference", "native", pytest.param("triton", marks=interpreted)]
PAGES, SIZE = 5, 4


def problem(heads: int, dim: int, value_dim: int, dtype: torch.dtype = torch.float32):
    """Keys and values that lie in one tensor's rows, caches that are not empty, slots in no order."""
    rows = normal(9, heads * (dim + value_dim) + 1, seed=0, dtype=dtype)
    key = rows[:, : heads * dim].view(9, heads, dim)
    value = rows[:, heads * dim : -1].view(9, heads, value_dim)
    caches = [normal(PAGES, SIZE, heads, d, seed=d, dtype=dtype) for d in (dim, value_dim)]
    return key, value, *caches, torch.tensor([19, 0, 7, 8, 3, 12, 1, 18, 5])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(2, 8, 8), (1, 6, 3), (40, 128, 64)])
def test_slots_hold_the_new_bits_and_all_others_the_old(heads, dim, value_dim, dtype, backend):
    key, value, k_cache, v_cache, slots = problem(heads, dim, value_dim, dtype)
    expected = [k_cache.clone(), v_cache.clone()]
    for row, slot in enumerate(slots.tolist()):
        expected[0][slot // SIZE, slot % SIZE] = key[row]
        expected[1][slot // SIZE, slot % SIZE] = value[row]
    write_kv_cache(key, value, k_cache, v_cache, slot_mapping=slots, backend=backend)
    assert same_bits(k_cache.float(), expected[0].float())
    assert same_bits(v_cache.float(), expected[1].float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_and_heads_of_other_strides(backend):
    key, value, k_cache, v_cache, slots = problem(3, 8, 8)
    before = k_cache.clone()
    write_kv_cache(key[:0], value[:0], k_cache, v_cache, slot_mapping=slots[:0], backend=backend)
    assert same_bits(k_cache, before)
    turned = key.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    write_kv_cache(turned, turned, k_cache, v_cache, slot_mapping=slots, backend=backend)
    assert same_bits(k_cache.flatten(0, 1)[slots], key)
    assert same_bits(v_cache.flatten(0, 1)[slots], key)


@interpreted
def test_a_slot_outside_of_the_caches_is_left_out():
    key, value, k_cache, v_cache, slots = problem(2, 8, 8)
    before = k_cache.clone()
    slots[0], slots[1] = -1, PAGES * SIZE
    write_kv_cache(key, value, k_cache, v_cache, slot_mapping=slots, backend="triton")
    kept = sorted(set(range(PAGES * SIZE)) - set(slots.tolist()))
    assert same_bits(k_cache.flatten(0, 1)[kept], before.flatten(0, 1)[kept])
    assert same_bits(k_cache.flatten(0, 1)[slots[2:]], key[2:])


def test_refusals_name_the_argument():
    key, value, k_cache, v_cache, slots = problem(2, 8, 8)

    def refused(match: str, **changes: torch.Tensor) -> None:
        given = {"key": key, "value": value, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slots} | changes
        with pytest.raises(ValueError, match=match):
            write_kv_cache(**given, backend="reference")

    refused("v_cache.dtype=torch.float16", v_cache=v_cache.half())
    refused(r"k_cache \(5, 4, 2, 7\)", k_cache=k_cache[..., :7].contiguous())
    refused(r"expected contiguous", k_cache=k_cache.transpose(0, 1))
    refused("differ in pages", v_cache=v_cache[:4])
    refused(r"slot_mapping is torch.int32", slot_mapping=slots.int())
    refused(r"slot_mapping is torch.int64 \(8,\), expected torch.int64 \[9\]", slot_mapping=slots[:8])
    refused(r"value \(8, 2, 8\)", value=value[:8])
    with pytest.raises(NotImplementedError, match="has no gradient"):
        write_kv_cache(key.requires_grad_(), value, k_cache, v_cache, slot_mapping=slots, backend="reference")
