"""The faults of tests/cli/test_faults.py on a GPU: engines of PyTorch's operators or ours, scored by the Triton path.

Also where a fault begins (``bisect``), and the checks that a run makes now and then. Tiny models in float32, so that a
fault stands out from rounding; what must be equal is compared in bfloat16 too. One ULP, a norm's epsilon and a wrong KV
block are planted between two Triton paths: beside PyTorch's operators every output differs, and none is the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faults import (
    COOL,
    FAULTS,
    PLAIN,
    PROMPTS,
    Remembering,
    Stand,
    damaged,
    engine_dump,
    found_name,
    save_models,
)

from rlalign.actors.faults import flip_weight_bit
from rlalign.actors.inspection import Inspector, packed, paged
from rlalign.cli.forwards import make_feed
from rlalign.cli.heads import head_logprobs
from rlalign.cli.policies import Policies
from rlalign.cli.recording import Side, recorded_pairs, tokens_of
from rlalign.cli.scoring import PolicyScorer
from rlalign.cli.verify import main
from rlalign.config import EngineConfig
from rlalign.modeling import Policy, load_policy
from rlalign.verifier.attribute import attribute
from rlalign.verifier.bisect import Bisection, bisect
from rlalign.verifier.config_causes import config_changes
from rlalign.verifier.dumps import DumpSequence, write_dump
from rlalign.verifier.full_vocabulary import check_full_vocabulary
from rlalign.verifier.layers import check_layers
from rlalign.verifier.periodic import Excerpt
from rlalign.verifier.score import ScoreSettings

GPU = {"device": "cuda"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def native(folder: Path) -> Stand:
    return Stand.of(folder, numerics="native", **GPU)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Remembering:
    return Remembering(PolicyScorer(Policies([folder / "model", folder / "older"], "float32", "cuda", kept=9)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_another_engine_is_named(fault: str, native: Stand, scorer: Remembering) -> None:
    plant, name = FAULTS[fault]
    changes = config_changes(json.loads((native.folder / "model" / "config.json").read_text()), [])
    found = attribute(plant(native), scorer, decode=False, num_previous=1, config_changes=changes)
    assert found_name(found) == name
    assert found.rest.mean_abs < 0.05 * found.base.mean_abs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("params", [PLAIN, COOL], ids=["plain", "cool"])
def test_our_engines_dump_is_equal_in_every_bit(dtype: str, params: Any, folder: Path, tmp_path: Path) -> None:
    write_dump(tmp_path / "dump.jsonl", engine_dump(load_policy(folder / "model", dtype=dtype, **GPU), params))
    options = ["--model", str(folder / "model"), "--device", "cuda", "--dtype", dtype]
    assert main(["dump", str(tmp_path / "dump.jsonl"), *options]) == 0


@pytest.mark.parametrize(
    ("kind", "numerics"),
    # among PyTorch's roundings one ULP more is nobody's fault
    [("one ULP", "invariant"), *product(("missing", "NaN", "-inf"), ("invariant", "native"))],
)
def test_a_damaged_log_prob_is_placed(kind: str, numerics: Any, folder: Path, tmp_path: Path) -> None:
    dumped = engine_dump(load_policy(folder / "model", dtype="bfloat16", numerics=numerics, **GPU), PLAIN)
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    write_dump(file, damaged(dumped, kind))
    options = ["--model", str(folder / "model"), "--device", "cuda", "--dtype", "bfloat16", "--json", str(out)]
    assert main(["dump", str(file), *options]) == 1
    found = json.loads(out.read_text())
    assert (found["metrics"]["align/mismatch_count"] == 1) == (numerics == "invariant")
    assert found["metrics"]["align/nonfinite_count"] == (kind != "one ULP")
    worst = found["worst_tokens"][0]
    assert (worst["position"], worst["ulp"]) == (5, 1 if kind == "one ULP" else -1)


class WrongBlock(Side):
    """From the fifth decoding step on, the second sequence reads the first one's first page."""

    def forwards(self, max_rows: int) -> Any:
        for step, forward in enumerate(super().forwards(max_rows)):
            if step >= 5:
                forward.context.block_tables[1, 0] = forward.context.block_tables[0, 0]
            yield forward


def two_sides(
    folder: Path, settings: ScoreSettings, plant: Callable[[Policy], object] = lambda _policy: None, kind: type = Side
) -> Bisection:
    """The Triton policy against itself with a fault, on the same tokens."""
    generator = np.random.default_rng(0)
    sequences = [
        DumpSequence(str(i), ids[:20], ids[20:], np.zeros(20, np.float32))
        for i, ids in enumerate(generator.integers(0, 97, (2, 40)))
    ]
    sides = []
    for side, planted in ((Side, lambda _policy: None), (kind, plant)):
        policy = load_policy(folder / "model", dtype="bfloat16", **GPU)
        planted(policy)
        feeds = [
            make_feed(s, s.prompt_token_ids, s.token_ids, settings, longest_prompt=20, pad_id=0) for s in sequences
        ]
        sides.append(side(policy, feeds, settings))
    targets = np.concatenate([np.concatenate([s.prompt_token_ids, s.token_ids])[1:] for s in sequences])
    pairs = recorded_pairs(*sides, targets, head_logprobs, max_bytes=2**30, max_rows=8192)
    return bisect(pairs, tokens_of(sides[0].feeds))


def test_no_schedule_of_the_triton_path_differs(folder: Path) -> None:
    assert two_sides(folder, ScoreSettings()).equal
    assert two_sides(folder, ScoreSettings(phase="decode", chunk=7)).equal


def test_one_layers_norm_epsilon_is_named(folder: Path) -> None:
    def plant(policy: Policy) -> None:
        policy.model.model.layers[1].post_attention_layernorm.rlalign_eps = 1e-1

    first = two_sides(folder, ScoreSettings(), plant).first
    assert first is not None
    assert (first.site.layer, first.site.module) == (1, "model.layers.1.post_attention_layernorm")


def test_a_wrong_kv_block_is_named(folder: Path) -> None:
    found = two_sides(folder, ScoreSettings(phase="decode"), kind=WrongBlock)
    assert found.first is not None
    assert (found.first.site.module, found.first.site.operator) == ("model.layers.0.self_attn", "attention")
    row = found.first.token
    assert (found.tokens.sequence[row], found.tokens.position[row]) == (1, 20 + 4)


_EXCERPTS = [Excerpt(str(i), np.array(prompt), np.arange(3, 15)) for i, prompt in enumerate(PROMPTS)]


def inspectors(
    folder: Path, plant: Callable[[Policy], object] | None = None, dtype: str = "bfloat16", **rollout_is: Any
) -> list[Inspector]:
    rollout, train = (load_policy(folder / "model", dtype=dtype, **GPU, **given) for given in (rollout_is, {}))
    if plant is not None:
        plant(train)
    return [Inspector(rollout, paged(EngineConfig(prefill_chunk=3))), Inspector(train, packed)]


def test_a_runs_checks_agree_on_the_triton_path(folder: Path) -> None:
    sides = inspectors(folder)
    sides[0].policy.fuse_projections()  # as an engine does
    vocabulary, layers = check_full_vocabulary(*sides, _EXCERPTS, positions=8), check_layers(*sides, _EXCERPTS)
    assert vocabulary.equal and vocabulary.kl.max() == 0, vocabulary.verdict
    assert layers.equal, layers.verdict


def test_a_runs_checks_measure_native_operators_against_the_triton_path(folder: Path) -> None:
    # in bfloat16 a model this small has the same bits in all its layers: its sums are short, and rounded to 8 of them
    sides = inspectors(folder, dtype="float32", numerics="native")
    vocabulary, layers = check_full_vocabulary(*sides, _EXCERPTS, positions=8), check_layers(*sides, _EXCERPTS)
    assert not vocabulary.equal and 0 < vocabulary.kl.mean() < 0.1
    assert not layers.equal and max(layers.max_ulp) >= 1


def test_a_runs_checks_find_one_flipped_bit(folder: Path) -> None:
    sides = inspectors(folder, flip_weight_bit)
    vocabulary, layers = check_full_vocabulary(*sides, _EXCERPTS, positions=8), check_layers(*sides, _EXCERPTS)
    # not of every token: what the norm gives may round to what it was
    assert vocabulary.differing > 0.9 * vocabulary.tokens and vocabulary.kl.max() > 1e-6
    assert layers.first is not None and layers.first.module == "model.norm"
