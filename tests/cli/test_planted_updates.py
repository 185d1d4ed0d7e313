"""Weights that changed while responses were under way, planted by plain transformers: each way of it is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import tiny_model
from transformers import DynamicCache, PreTrainedModel

from rlalign.cli.policies import Policies
from rlalign.cli.scoring import PolicyScorer
from rlalign.cli.verify import main
from rlalign.verifier.dumps import DumpSequence, write_dump
from rlalign.verifier.score import ScoreSettings

# prompt and response tokens, and how many of the response's were under way when the weights changed
LENGTHS = ((20, 24), (37, 20), (18, 26), (33, 22), (25, 21), (40, 25))
CUTS = (6, 0, 13, 22, 17, 9)
FEW = (1, 2, 3, 17, 2, 1)
KEPT = "stale_weights[1].in_flight.cache_kept"


Models = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(scope="module")
def models() -> Models:
    """An older one, and the one that it became."""
    older, newer = tiny_model("qwen3"), tiny_model("qwen3")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02 * parameter.std())
    return older, newer


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, model in zip(("older", "newer"), models, strict=True):
        model.save_pretrained(folder / name)
    return folder


@torch.no_grad()
def decoded(
    models: Models, prompt: list[int], response: list[int], cut: int, block: int | None, temperature: float = 1.0
) -> np.ndarray:
    """Log-probs float32 [L], token by token; the first ``cut`` of the older model. block: the cache is kept as far as
    it fills so many tokens, or a multiple; None: not at all."""
    ids, cache, fed, found = prompt + response, DynamicCache(), 0, []
    for place, token in enumerate(response):
        if 0 < place == cut:
            kept = fed // block * block if block else 0
            cache = DynamicCache([(keys[:, :, :kept], values[:, :, :kept]) for keys, values, *_ in cache])
            fed = kept
        end = len(prompt) + place
        logits = models[place >= cut](torch.tensor([ids[fed:end]]), past_key_values=cache, use_cache=True).logits[0, -1]
        found.append(torch.log_softmax(logits.float() / temperature, -1)[token].item())
        fed = end
    return np.array(found, np.float32)


@torch.no_grad()
def upon_prompt(models: Models, prompt: list[int], response: list[int]) -> np.ndarray:
    """Log-probs float32 [L] of the newer model, which finds the prompt in the older one's prefix cache."""
    cache = DynamicCache()
    models[0](torch.tensor([prompt[:-1]]), past_key_values=cache, use_cache=True)
    logits = models[1](torch.tensor([prompt[-1:] + response[:-1]]), past_key_values=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


def make_dump(how: Callable[[int, list[int], list[int]], np.ndarray]) -> list[DumpSequence]:
    """how: of a sequence's place, prompt and response the log-probs float32 [L]."""
    random, made = np.random.default_rng(5), []
    for index, (prompt_length, length) in enumerate(LENGTHS):
        prompt, response = random.integers(0, 97, prompt_length), random.integers(0, 97, length)
        values = how(index, prompt.tolist(), response.tolist())
        made.append(DumpSequence(str(index), prompt, response, values, source=f"dump:{index}"))
    return made


def run(dump: list[DumpSequence], folder: Path, tmp_path: Path, *options: str) -> dict:
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    write_dump(file, dump)
    models = ["--model", str(folder / "newer"), "--previous-model", str(folder / "older")]
    main(["attribute", "--dump", str(file), *models, "--json", str(out), "--no-decode", *options])
    return json.loads(out.read_text())


def named(found: dict) -> list[str]:
    return [step["name"] for step in found["causes"] if step["kind"] != "numerics"]


@pytest.mark.parametrize("numerics", ["invariant", "native"])
@pytest.mark.parametrize(
    ("cuts", "block", "cause"),
    [
        (CUTS, 1, KEPT),
        (CUTS, 16, KEPT),
        (FEW, 1, KEPT),
        ((0, 0, 11, 0, 0, 0), 1, KEPT),
        (CUTS, None, "stale_weights[1].in_flight"),
        (tuple(length for _, length in LENGTHS), 1, "stale_weights[1]"),
        ((0,) * len(LENGTHS), 1, None),
    ],
    ids=["kept", "kept in blocks", "kept after a few", "kept in one", "recomputed", "stale", "clean"],
)
def test_how_weights_were_updated_is_named(cuts, block, cause, numerics, models, folder, tmp_path):
    dump = make_dump(lambda place, p, r: decoded(models, p, r, cuts[place], block))
    found = run(dump, folder, tmp_path, "--numerics", numerics)
    assert named(found) == ([cause] if cause else [])
    assert found["rest"]["max_abs"] < 1e-5 and found["explained"]
    if cause and "in_flight" in cause:
        [step] = (step for step in found["causes"] if step["name"] == cause)
        touched = [place for place, cut in enumerate(cuts) if cut]
        assert touched == ([s["place"] for s in step["sequences"]] if step["sequences"] else list(range(len(cuts))))
        inside = [str(cut) for cut, (_, length) in zip(cuts, LENGTHS, strict=True) if 0 < cut < length]
        assert f"({', '.join(inside[:5])}" in step["what"]
        assert ("blocks of 16" in step["what"]) == (block == 16)


def test_a_temperature_that_nobody_names_is_found_beside_a_kept_cache(models, folder, tmp_path, monkeypatch):
    # of a long dump a part is fitted; here too
    monkeypatch.setattr("rlalign.verifier.sampling_fit._FIT_TOKENS", 64)
    found = run(make_dump(lambda place, p, r: decoded(models, p, r, CUTS[place], 1, 0.99)), folder, tmp_path)
    assert set(named(found)) == {KEPT, "temperature=0.99"}  # cuts may be found once more, beside the temperature
    assert found["rest"]["max_abs"] < 1e-5 and found["explained"]


def test_a_stale_prefix_cache_is_no_update_in_flight(models, folder, tmp_path):
    found = run(make_dump(lambda _, p, r: upon_prompt(models, p, r)), folder, tmp_path)
    assert found["base"]["mean_abs"] > 1e-3
    assert named(found) == [] and not found["explained"]


def test_an_update_that_nobody_has_the_older_weights_of_is_not_explained(models, folder, tmp_path):
    other = tiny_model("qwen3")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.02)
    dump = make_dump(lambda place, p, r: decoded((other, models[1]), p, r, CUTS[place], 1))
    found = run(dump, folder, tmp_path)
    assert KEPT not in named(found) and not found["explained"]


@pytest.mark.parametrize("options", [{}, {"phase": "decode"}, {"chunk": 7}, {"padding": "left_seen"}])
def test_a_cache_that_the_same_weights_filled_changes_no_bit(options, folder):
    """Only the tokens that it predicted are left out; of a prompt that was padded as many."""
    scorer = PolicyScorer(Policies([folder / "newer"], "float32"))
    dump = make_dump(lambda _place, _p, r: np.zeros(len(r), np.float32))
    cut = [6, 0, 20]
    cached = tuple(n and len(s.prompt_token_ids) - 1 + n for n, s in zip(cut, dump, strict=False))
    plain, kept = (scorer(dump[:3], ScoreSettings(**options, cached=rows)) for rows in ((), cached))
    for a, b, count in zip(plain, kept, cut, strict=True):
        assert np.isnan(b[:count]).all()
        assert np.array_equal(a[count:].view(np.int32), b[count:].view(np.int32))
