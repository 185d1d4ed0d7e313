"""Faults planted in the dumps of an engine that is PyTorch's, against our operators: each is named, on a CPU.

tests/gpu/test_faults.py does the same on the Triton path.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.faults import COOL, FAULTS, PLAIN, Remembering, Stand, damaged, engine_dump, found_name, save_models

from rlalign.cli.policies import Policies
from rlalign.cli.scoring import PolicyScorer
from rlalign.cli.verify import main
from rlalign.modeling import load_policy
from rlalign.verifier.attribute import attribute
from rlalign.verifier.config_causes import config_changes
from rlalign.verifier.dumps import DumpSequence, write_dump


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Stand:
    return Stand.of(save_models(tmp_path_factory.mktemp("models")), numerics="native")


@pytest.fixture(scope="module")
def scorer(stand: Stand) -> Remembering:
    return Remembering(PolicyScorer(Policies([stand.folder / "model", stand.folder / "older"], "float32", kept=9)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_another_engine_is_named(fault, stand, scorer):
    plant, name = FAULTS[fault]
    changes = config_changes(json.loads((stand.folder / "model" / "config.json").read_text()), [])
    found = attribute(plant(stand), scorer, decode=False, num_previous=1, config_changes=changes)
    assert found_name(found) == name
    assert found.rest.mean_abs < 1e-3 * found.base.mean_abs + 1e-6


def test_an_engine_of_16_bits_is_named_under_float32_scoring(stand, scorer):
    # other operators than ours besides: little of the difference goes, but the errors go the same way
    engine = load_policy(stand.folder / "model", numerics="native", dtype="bfloat16")
    found = attribute(engine_dump(engine, COOL), scorer, decode=False)
    assert found_name(found) == "dtype.bfloat16"
    assert 0.1 < found.rest.mean_abs / found.base.mean_abs < 0.9
    assert "rounding explains it" in found.verdict


@pytest.fixture(scope="module")
def ours(stand: Stand) -> list[DumpSequence]:
    """Our own engine's dump is equal in every bit, so that one ULP is all that differs."""
    return engine_dump(load_policy(stand.folder / "model"), PLAIN)


@pytest.mark.parametrize("kind", ["one ULP", "missing", "NaN", "-inf"])
def test_a_damaged_log_prob_is_placed(kind, stand, ours, tmp_path: Path):
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    write_dump(file, damaged(ours, kind))
    options = ["dump", str(file), "--model", str(stand.folder / "model"), "--json", str(out)]
    assert main(options) == 1
    found = json.loads(out.read_text())
    assert found["metrics"]["align/mismatch_count"] == 1
    assert found["metrics"]["align/nonfinite_count"] == (kind != "one ULP")
    worst = found["worst_tokens"][0]
    assert (worst["position"], worst["ulp"]) == (5, 1 if kind == "one ULP" else -1)
