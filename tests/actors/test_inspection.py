"""Both sides of a run's periodic checks in one process: equal bits give equal digests, and what differs is named."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.models import FAMILIES, tiny_model
from support.samples import make_samples
from support.trainers import make_policy

from rlalign.actors.faults import flip_weight_bit
from rlalign.actors.inspection import Inspecting, Inspector, digest, packed, paged
from rlalign.config import EngineConfig
from rlalign.modeling import PackedContext, Policy
from rlalign.run.comparison import Checks
from rlalign.run.pictures import layer_row
from rlalign.verifier.full_vocabulary import FullVocabulary, check_full_vocabulary, divergence
from rlalign.verifier.layers import check_layers
from rlalign.verifier.periodic import Excerpt, choose_excerpts, due

SAMPLES = make_samples([(5, 9), (12, 30), (3, 1), (7, 4)])
EXCERPTS = choose_excerpts(SAMPLES, count=3, tokens=8, seed=0, step=1)
ENGINE = EngineConfig(page_size=4, prefill_chunk=5)


def sides(backend: str = "reference", plant: Callable[[Policy], object] | None = None, **options: object):
    rollout, train = make_policy(backend, **options), make_policy(backend, **options)
    if plant is not None:
        plant(train)
    return Inspector(rollout, paged(ENGINE)), Inspector(train, packed)


def vocabulary(*given: Inspector, positions: int = 5) -> FullVocabulary:
    return check_full_vocabulary(*given, EXCERPTS, positions=positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_sides_have_equal_digests_and_no_divergence(dtype):
    given = sides(dtype=dtype)
    found, layers = vocabulary(*given), check_layers(*given, EXCERPTS)
    assert found.equal and found.tokens == sum(len(e.response_ids) for e in EXCERPTS) > 10
    assert found.metrics() == {
        "align/full_vocab/tokens": found.tokens, "align/full_vocab/hash_match_frac": 1.0, "align/full_vocab/kl/mean": 0,
        "align/full_vocab/kl/max": 0, "align/full_vocab/logp_abs_diff/max": 0,
    }  # fmt: skip
    assert layers.equal and layers.metrics() == {"align/bisect/sites_differ": 0, "align/bisect/equal_layers": 2}
    assert set(layers.max_ulp) == {0.0} and "bit for bit equal" in layers.verdict


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3"])
def test_other_families_agree_too(family, monkeypatch):
    monkeypatch.setattr("support.trainers.tiny_model", lambda _family, dtype, seed: tiny_model(family, dtype, seed))
    given = sides()
    assert vocabulary(*given).equal and check_layers(*given, EXCERPTS).equal


def test_native_operators_differ_a_little_and_the_layers_are_named():
    rollout, train = sides("native")
    found, layers = vocabulary(rollout, train), check_layers(rollout, train, EXCERPTS)
    assert 0 < found.kl.mean() <= found.kl.max() < 1e-9 and 0 < found.max_abs.max() < 1e-4
    assert not layers.equal and layers.metrics()["align/bisect/sites_differ"] > 5
    row = layer_row(layers)
    assert row.names == ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm")
    assert row.difference[:2] == (0, 0) and all(1 <= value < 1e6 for value in row.difference[2:])


def test_one_flipped_bit_of_the_last_norm_is_found_behind_all_layers():
    rollout, train = sides(plant=flip_weight_bit)
    found, layers = vocabulary(rollout, train), check_layers(rollout, train, EXCERPTS)
    assert found.differing == found.tokens and found.kl.max() > 1e-6
    assert f"on {found.tokens} of {found.tokens} tokens, first in sample {EXCERPTS[0].name} position 0" in found.verdict
    assert layers.first.module == "model.norm" and layers.metrics()["align/bisect/equal_layers"] == 2
    assert layer_row(layers).difference[:-1] == (0, 0, 0, 0) and layer_row(layers).difference[-1] > 1000
    assert layers.where == (EXCERPTS[0].name, 0) and f"on {layers.num_rows} of {layers.num_rows} rows" in layers.verdict


def one_ulp(policy: Policy) -> None:
    weight = policy.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] += 1 << 12


def test_a_changed_weight_inside_a_layer_is_named():
    layers = check_layers(*sides(plant=one_ulp), EXCERPTS)
    assert (layers.first.layer, layers.first.module) == (1, "model.layers.1.mlp.up_proj")
    assert layers.metrics()["align/bisect/equal_layers"] == 1
    assert layer_row(layers).difference[2] == 0 < layer_row(layers).difference[3]


def test_a_changed_output_layer_is_named(monkeypatch):
    monkeypatch.setattr("support.trainers.tiny_model", lambda _family, dtype, seed: tiny_model("qwen2", dtype, seed))

    def plant(policy: Policy) -> None:
        with torch.no_grad():
            policy.head.weight[3] += 1e-3

    given = sides(plant=plant)
    assert given[1].policy.head.weight is not given[1].policy.model.get_input_embeddings().weight
    checks = Checks(vocabulary(*given), check_layers(*given, EXCERPTS))
    assert checks.layers.equal and not checks.full_vocabulary.equal
    assert "logits over the whole vocabulary differ" in checks.beyond[0] and "the output layer (" in checks.beyond[1]
    assert Checks(None, checks.layers).beyond == ()


def test_nan_is_infinite_and_never_agreement():
    def plant(policy: Policy) -> None:
        with torch.no_grad():
            policy.model.model.norm.weight[0] = math.nan

    found, layers = vocabulary(*sides(plant=plant)), check_layers(*sides(plant=plant), EXCERPTS)
    assert found.kl.max() == np.inf and found.max_abs.max() == np.inf
    assert layer_row(layers).difference[-1] == np.inf


def test_a_fault_of_one_sequence_is_found_in_that_one():
    def wrong_block(policy, feeds):
        """The second sequence reads the first one's first page, from its third decoded token on."""
        for step, forward in enumerate(paged(ENGINE)(policy, feeds)):
            if step >= 3:
                forward.context.block_tables[1, 0] = forward.context.block_tables[0, 0]
            yield forward

    excerpts = choose_excerpts(make_samples([(5, 8), (5, 8)]), count=2, tokens=8, seed=0, step=1)
    policy = make_policy()
    layers = check_layers(Inspector(policy, wrong_block), Inspector(policy, packed), excerpts)
    assert (layers.first.module, layers.first.operator) == ("model.layers.0.self_attn", "attention")
    assert layers.where == (excerpts[1].name, 5 + 2)


def test_logits_are_those_of_the_model():
    policy = make_policy()
    ids = np.concatenate([EXCERPTS[0].prompt_ids, EXCERPTS[0].response_ids])
    logits = Inspector(policy, packed).logits_at(EXCERPTS, [0, 2])
    with torch.no_grad():
        context = PackedContext(torch.tensor([0, len(ids)], dtype=torch.int32))
        expected = policy.model(torch.from_numpy(ids)[None], position_ids=torch.arange(len(ids))[None], use_cache=False,
                         attention_context=context).logits[0]  # fmt: skip
    first = len(EXCERPTS[0].prompt_ids) - 1
    np.testing.assert_allclose(logits, expected[[first, first + 2]].numpy(), atol=1e-5)


def test_divergence_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    kl, largest = divergence(np.log(p)[None].astype(np.float32), np.log(q)[None].astype(np.float32) + 3)
    # 0.5 ln 2 - 0.25 ln 2; logits may be shifted by any constant
    assert kl == pytest.approx([0.25 * math.log(2)], rel=1e-6) and largest == pytest.approx([math.log(2)], rel=1e-6)
    never = np.array([[0.0, -np.inf]], np.float32)
    assert divergence(never, np.zeros((1, 2), np.float32))[0] == pytest.approx([math.log(2)])
    assert divergence(np.zeros((1, 2), np.float32), never)[0] == [np.inf]


def test_a_digest_tells_any_single_change_and_any_swap():
    rows = torch.randn(4, 300)
    rows[1] = rows[0]
    rows[2] = rows[0].flip(0)
    before = digest(rows)
    assert before[0] == before[1] != before[2]
    for place in range(0, 300, 7):
        changed = rows[:1].clone()
        changed.view(torch.int32)[0, place] ^= 1 << (place % 32)
        assert digest(changed) != before[0]
    assert digest(torch.tensor([[0.0]])) != digest(torch.tensor([[-0.0]]))


def test_excerpts_are_a_function_of_seed_and_step_and_reach_late_positions():
    long = make_samples([(4, 100)] * 8)
    chosen = choose_excerpts(long, count=2, tokens=10, seed=3, step=7)
    again = choose_excerpts(long[::-1], count=2, tokens=10, seed=3, step=7)
    assert [e.name for e in chosen] == [e.name for e in again] == sorted(e.name for e in chosen)
    names = {e.name for step in range(20) for e in choose_excerpts(long, count=2, tokens=10, seed=3, step=step)}
    assert len(names) == 8
    lengths = {len(e.prompt_ids) for e in choose_excerpts(long, count=8, tokens=10, seed=3, step=7)}
    assert len(lengths) > 4 and max(lengths) > 50
    for excerpt in choose_excerpts(long, count=8, tokens=10, seed=3, step=7):
        sample = next(s for s in long if "/".join(map(str, s.key)) == excerpt.name)
        whole = np.concatenate([sample.completion.prompt_ids, sample.completion.token_ids])
        joined = np.concatenate([excerpt.prompt_ids, excerpt.response_ids])
        assert len(excerpt.response_ids) == 10 and np.array_equal(joined, whole[: len(joined)])
    assert choose_excerpts(make_samples([(3, 0)]), count=2, tokens=5, seed=0, step=1) == []


def test_when_checks_are_due():
    assert [step for step in range(1, 45) if due(20, step)] == [1, 20, 40]
    assert not any(due(0, step) for step in range(1, 45))


def test_digests_asked_ahead_are_not_asked_for_again():
    calls: list[tuple[str, object]] = []

    def ask(what: str, excerpts: object) -> Callable[[], object]:
        calls.append((what, excerpts))
        return lambda: what

    ahead = Inspecting(ask, EXCERPTS, {"logit_digests": lambda: "ahead"})
    assert (ahead.logit_digests(EXCERPTS), ahead.site_digests(EXCERPTS)) == ("ahead", "site_digests")
    assert ahead.logit_digests(list(EXCERPTS)) == "logit_digests"
    assert [what for what, _ in calls] == ["site_digests", "logit_digests"]


def test_two_models_are_refused():
    class Other(Inspector):
        def site_digests(self, excerpts: list[Excerpt]):
            found = super().site_digests(excerpts)
            return type(found)(found.sites[:-1], found.digests[:-1])

    policy = make_policy()
    with pytest.raises(ValueError, match="the same modules in the same order"):
        check_layers(Other(policy, packed), Inspector(policy, packed), EXCERPTS)
