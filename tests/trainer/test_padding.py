"""T4: padding of any side, amount and value gives the bits of the packed sequences, or is refused."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model

from rlalign.modeling import Policy, align
from rlalign.trainer import score_padded, unpad

LENGTHS = (5, 1, 12, 7)


def padded(lefts: list[int], width: int, pad: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(97, (n,), generator=generator) for n in LENGTHS]
    ids = torch.full((len(LENGTHS), width), pad)
    mask = torch.zeros_like(ids)
    for row, (left, sequence) in enumerate(zip(lefts, sequences, strict=True)):
        ids[row, left : left + len(sequence)] = sequence
        mask[row, left : left + len(sequence)] = 1
    return ids, mask, sequences


LAYOUTS = {
    "right": ([0, 0, 0, 0], 12),
    "left": ([7, 11, 0, 5], 12),
    "wider": ([25, 29, 18, 23], 30),
    "both sides": ([3, 0, 6, 10], 40),
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_padding(layout: str, backend: str) -> None:
    policy = Policy(align(tiny_model("qwen3"), backend=backend))
    lefts, width = LAYOUTS[layout]
    reference_ids, reference_mask, _ = padded([0, 0, 0, 0], 12, pad=0)
    expected = score_padded(policy, reference_ids, reference_mask)[reference_mask.bool()]
    for pad in (0, 96):
        ids, mask, _ = padded(lefts, width, pad)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        got = score_padded(policy, ids, mask, positions)
        assert torch.equal(got[mask.bool()].view(torch.int32), expected.view(torch.int32))
        assert (got[mask == 0] == 0).all()
    assert (expected != 0).sum() == sum(LENGTHS) - len(LENGTHS)


def test_unpadded_log_probs_are_those_of_each_sequence_alone() -> None:
    policy = Policy(align(tiny_model("llama"), backend="reference"))
    ids, mask, sequences = padded([3, 0, 6, 10], 40, pad=5)
    together = score_padded(policy, ids, mask)
    for row, sequence in enumerate(sequences):
        alone = score_padded(policy, sequence.unsqueeze(0), torch.ones_like(sequence).unsqueeze(0))[0]
        assert torch.equal(together[row][mask[row].bool()].view(torch.int32), alone.view(torch.int32))


def test_what_disagrees_with_the_mask_is_refused() -> None:
    ids, mask, _ = padded([7, 11, 0, 5], 12, pad=0)
    with pytest.raises(ValueError, match=r"position_ids\[0, 7\]=7 disagrees with attention_mask, which makes it 0"):
        unpad(ids, mask, torch.arange(12).expand(4, 12))
    with pytest.raises(ValueError, match=r"position_ids has shape \(12,\)"):
        unpad(ids, mask, torch.arange(12))
    holed = mask.clone()
    holed[2, 4] = 0
    with pytest.raises(ValueError, match="hole in row 2"):
        unpad(ids, holed)
    with pytest.raises(ValueError, match="keeps nothing in row 1"):
        unpad(ids, mask * torch.tensor([[1], [0], [1], [1]]))
    with pytest.raises(ValueError, match="other than 0 and 1"):
        unpad(ids, mask * 2)
    with pytest.raises(ValueError, match=r"attention_mask \(4, 11\)"):
        unpad(ids, mask[:, :-1])
