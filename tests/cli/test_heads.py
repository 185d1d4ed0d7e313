"""Log-probs from hidden states in the ways of ``ScoreSettings`` that no other test of the command line looks at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import tiny_model

from rlalign.cli.heads import head_logprobs
from rlalign.config import SamplingParams
from rlalign.modeling import load_policy
from rlalign.verifier.score import ScoreSettings, UnsupportedSetting


def test_slack_keeps_what_is_nearly_as_likely_as_the_least_kept_token(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    (first, second), (best, next_best) = (hidden @ policy.head.weight.T)[0].topk(2)
    gap = (first - second).item()
    assert gap > 0.05
    params = [SamplingParams(top_k=1)]

    def score(target: torch.Tensor, slack: float) -> float:
        return head_logprobs(policy, hidden, target[None], ScoreSettings(slack=slack), params).item()

    assert score(best, 0.0) == 0.0
    assert score(next_best, 0.0) == score(next_best, 0.5 * gap) == -float("inf")
    assert -10 < score(next_best, 2 * gap) < score(best, 2 * gap) < 0.0


def test_slack_is_not_as_coarse_as_bfloat16(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    logits, ids = (hidden @ policy.head.weight.T)[0].sort(descending=True)
    gaps = logits[:-1] - logits[1:]
    coarse = logits.bfloat16()
    kept = int(torch.nonzero((coarse[:-1] == coarse[1:]) & (gaps > 1e-4))[0]) + 1
    params, slack = [SamplingParams(top_k=kept)], 0.25 * gaps[kept - 1].item()
    first_left_out = ids[kept][None]
    assert head_logprobs(policy, hidden, first_left_out, ScoreSettings(slack=slack), params).item() == -float("inf")
    assert head_logprobs(policy, hidden, first_left_out, ScoreSettings(slack=8 * slack), params).isfinite()


def test_logits_that_float16_cannot_imitate_are_refused(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    policy, settings = load_policy(tmp_path), ScoreSettings(logits="float16")
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    assert head_logprobs(policy, hidden, torch.tensor([0]), settings).isfinite()
    with pytest.raises(UnsupportedSetting, match="a logit is beyond float16's range"):
        head_logprobs(policy, 1e6 * hidden, torch.tensor([0]), settings)
    coarse = load_policy(tmp_path, dtype="bfloat16")
    with pytest.raises(UnsupportedSetting, match="the model computes in bfloat16, which is coarser"):
        head_logprobs(coarse, hidden.bfloat16(), torch.tensor([0]), settings)


def test_slack_keeps_no_banned_id(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    best = (hidden @ policy.head.weight.T).argmax(1)
    banned = torch.zeros(1, policy.vocab_size, dtype=torch.bool)
    banned[0, best] = True
    for params in (SamplingParams(top_k=5, min_tokens=1), SamplingParams(top_p=0.9, min_tokens=1)):
        for slack in (0.0, 0.1):
            scored = head_logprobs(policy, hidden, best, ScoreSettings(slack=slack), [params], banned)
            assert scored.item() == -float("inf")
