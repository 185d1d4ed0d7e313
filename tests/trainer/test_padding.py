"""T4: padding of any side, amount and value gives the bits of the packed sequences, or is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.engines import mixed_params, random_prompts
from support.trainers import make_policy, make_trainer

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.records import Completion
from rlalign.trainer import unpad

LENGTHS = (5, 1, 12, 7)
PARAMS = mixed_params(1, 12, max_tokens=12)


def padded(lefts: list[int], width: int, pad: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(97, (n,), generator=generator) for n in LENGTHS]
    ids = torch.full((len(LENGTHS), width), pad)
    mask = torch.zeros_like(ids)
    for row, (left, sequence) in enumerate(zip(lefts, sequences, strict=True)):
        ids[row, left : left + len(sequence)] = sequence
        mask[row, left : left + len(sequence)] = 1
    return ids, mask, sequences


@pytest.fixture(scope="module")
def rollouts() -> list[Completion]:
    """Of the real engine: every way of sampling, prompts and responses of many lengths."""
    engine = Engine(make_policy(), None, EngineConfig(page_size=4, num_pages=400, max_batch_tokens=64, prefill_chunk=7))
    return [group[0] for group in engine.generate(random_prompts(0, 12, high=30), PARAMS)]


def padded_rollouts(
    rollouts: list[Completion], side: str, extra: int, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, response_mask); side "middle" puts every prompt's end into one column."""
    prompts, responses = [c.prompt_ids for c in rollouts], [c.token_ids for c in rollouts]
    longest = (
        max(map(len, prompts))
        if side == "middle"
        else max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    )
    width = longest + extra + (max(map(len, responses)) if side == "middle" else 0)
    ids, mask, response = (torch.full((len(rollouts), width), value) for value in (pad, 0, 0))
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        first = {"right": 0, "left": width - len(p) - len(r), "middle": longest - len(p)}[side]
        start, end = first + len(p), first + len(p) + len(r)
        ids[row, first:end] = torch.from_numpy(np.concatenate([p, r]))
        mask[row, first:end], response[row, start:end] = 1, 1
    return ids, mask, response


@pytest.mark.parametrize("side", ["right", "left", "middle"])
@pytest.mark.parametrize("extra", [0, 23])
@pytest.mark.parametrize("pad", [0, 96])
def test_t4_padded_rows_have_the_rollouts_bits(rollouts: list[Completion], side: str, extra: int, pad: int) -> None:
    ids, mask, response = padded_rollouts(rollouts, side, extra, pad)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    trainer = make_trainer(micro_batch_tokens=50, eos_ids=())
    got = trainer.logprobs_of_padded(
        ids, mask, position_ids=positions if extra else None, response_mask=response, sampling=PARAMS
    )
    expected = torch.from_numpy(np.concatenate([c.logprobs for c in rollouts]))
    assert torch.equal(got[response.bool()].view(torch.int32), expected.view(torch.int32))
    assert (got[response == 0] == 0).all()


def test_without_a_response_mask_every_token_but_a_rows_first_is_scored() -> None:
    trainer = make_trainer()
    ids, mask, sequences = padded([3, 0, 6, 10], 40, pad=5)
    together = trainer.logprobs_of_padded(ids, mask)
    for row, sequence in enumerate(sequences):
        alone = trainer.logprobs_of_padded(sequence.unsqueeze(0), torch.ones_like(sequence).unsqueeze(0))[0]
        assert torch.equal(together[row][mask[row].bool()].view(torch.int32), alone.view(torch.int32))
        assert alone[0] == 0 and (alone[1:] < 0).all()


def test_what_the_trainer_refuses_of_a_padded_batch() -> None:
    trainer, (ids, mask, _) = make_trainer(), padded([7, 11, 0, 5], 12, pad=0)
    with pytest.raises(ValueError, match=r"position_ids\[0, 7\]=7 disagrees with attention_mask, which makes it 0"):
        trainer.logprobs_of_padded(ids, mask, position_ids=torch.arange(12).expand(4, 12))
    with pytest.raises(ValueError, match="row 0: a response is the end"):
        trainer.logprobs_of_padded(ids, mask, response_mask=mask)
    inside = torch.zeros_like(mask)
    inside[2, 4] = 1
    with pytest.raises(ValueError, match="row 2: a response is the end"):
        trainer.logprobs_of_padded(ids, mask, response_mask=inside)
    with pytest.raises(ValueError, match="tokens that attention_mask leaves out"):
        trainer.logprobs_of_padded(ids, mask, response_mask=torch.ones_like(mask))
    with pytest.raises(ValueError, match="sampling has 1 entries for 4 rows"):
        trainer.logprobs_of_padded(ids, mask, sampling=[SamplingParams()])
    with pytest.raises(ValueError, match="min_tokens counts from a response's start"):
        trainer.logprobs_of_padded(ids, mask, sampling=[SamplingParams(min_tokens=2)] * 4)
    with pytest.raises(ValueError, match="row 0: prompt token id 97 is outside the vocabulary"):
        trainer.logprobs_of_padded(ids.masked_fill(mask == 1, 97), mask)


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
