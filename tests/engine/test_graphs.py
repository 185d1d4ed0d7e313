"""Decode steps in fixed shapes: which bucket, what is padded, when a graph is made, replayed and forgotten.

On a CPU a graph is a stand-in that runs the captured function again, on the same tensors; tests/gpu has the real ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.engines import MODEL_LIMIT, VOCAB, flat, mixed_params, outcome, random_prompts, roomy

from rlalign.actors.faults import kv_page_fault
from rlalign.config import EngineConfig, SamplingParams, config_from_dict
from rlalign.engine import Engine, graphs
from rlalign.engine.batch_inputs import ForwardInputs, draw_arrays, forward_arrays, forward_inputs, origins_of
from rlalign.engine.buckets import Bucket, bucket_of, decodes_only, padded_forward, padded_sampling
from rlalign.modeling import Policy
from rlalign.modeling.inner_attention import Invariant

PROMPTS = random_prompts(11, 7, low=3, high=30)
EVEN_IDS = tuple(range(0, VOCAB, 2))


class Rerun:
    """What a graph is on a CPU."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.replay = body


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines on a CPU use graphs; the list is what was captured, in order."""
    made: list[str] = []

    def capture(_self: graphs.Capture, body: Callable[[], None], what: str) -> Rerun:
        made.append(what)
        return Rerun(body)

    monkeypatch.setattr(Policy, "why_not_captured", lambda _self: None)
    monkeypatch.setattr(graphs.Capture, "__call__", capture)
    return made


def without_graphs(**changes: object) -> EngineConfig:
    return roomy(cuda_graphs=False, **changes)


def lengths(count: int, **settings: object) -> list[SamplingParams]:
    """Responses of ever more tokens, so that a batch shrinks by one sequence at a time."""
    return [SamplingParams(max_tokens=4 + 3 * i, seed=i, **settings) for i in range(count)]


@pytest.mark.parametrize(
    ("num_rows", "longest", "found"),
    [
        (1, 1, (1, 1024)), (2, 1024, (2, 1024)), (3, 1025, (4, 2048)), (33, 2048, (48, 2048)), (48, 2049, (48, 3000)),
        (50, 3000, (50, 3000)),
    ],
)  # fmt: skip
def test_a_bucket_holds_its_step_and_keeps_to_the_limits(num_rows, longest, found):
    assert bucket_of(num_rows, longest, max_num_seqs=48, max_length=3000) == Bucket(*found)


def test_few_buckets_hold_all_steps():
    steps = [(rows, length) for rows in range(1, 257) for length in range(1, 4097, 50)]
    found = {bucket_of(*step, max_num_seqs=256, max_length=4096) for step in steps}
    assert len(found) == 9 * 3


def test_padded_rows_change_nothing_and_write_to_the_spare_page(policy):
    """A decode step, as it is and in a bucket of 8: the same bits, cache included, however the spare page looks."""
    engine = Engine(policy, None, without_graphs(page_size=4, num_pages=60))
    for number, prompt in enumerate(PROMPTS[:5]):
        engine.add(str(number), prompt, SamplingParams(max_tokens=9, seed=number))
    engine.step()
    step = engine._scheduler.schedule()
    assert decodes_only(step)
    arrays = forward_arrays(step, 4)
    padded = padded_forward(arrays, Bucket(8, 64), page_size=4, spare_page=59)
    assert not engine._pool._holders[59]
    assert (padded["slot_mapping"][5:] // 4 == 59).all() and len(set(padded["slot_mapping"])) == 8
    assert padded["block_tables"].shape == (8, 16) and not padded["kv_lens"][5:].any()
    draws = draw_arrays(origins_of(step))
    settings = padded_sampling(draws, 8)
    assert settings.keys() | {"bans"} == draws.keys()
    assert all(len(settings[name]) == 8 and settings[name].dtype == draws[name].dtype for name in settings)
    caches = [*engine._runner.k_caches, *engine._runner.v_caches]
    before = [cache.clone() for cache in caches]
    alone = engine._runner.forward(forward_inputs(step, 4, torch.device("cpu")))
    after = [cache.clone() for cache in caches]
    for cache, kept in zip(caches, before, strict=True):
        cache.copy_(kept)
        cache[59] = torch.nan
    tensors = {name: torch.from_numpy(array) for name, array in padded.items()}
    found = engine._runner.forward(ForwardInputs(**tensors, max_seqlen_q=1, max_seqlen_k=64))
    assert torch.equal(found[:5].view(torch.int32), alone.view(torch.int32)) and torch.isfinite(found).all()
    for cache, kept in zip(caches, after, strict=True):
        assert torch.equal(cache[:59], kept[:59])


@pytest.mark.parametrize("changes", [{}, {"page_size": 4, "num_pages": 26}], ids=["roomy", "preempted"])
def test_engine_on_graphs_draws_the_same(policy, captured, changes):
    params = lengths(7)
    eager = Engine(policy, None, without_graphs(**changes))
    clean = flat(eager.generate(PROMPTS, params))
    assert eager.stats["graph_steps"] == 0 and captured == []
    engine = Engine(policy, None, roomy(**changes))
    assert outcome(flat(engine.generate(PROMPTS, params))) == outcome(clean)
    stats = engine.stats
    assert (stats["preemptions"] > 0) == bool(changes)
    assert captured[:2] == ["forward of 8 rows", "draw of 8 rows"]
    assert {"forward of 4 rows", "forward of 2 rows", "forward of 1 rows"} < set(captured)
    assert len(captured) == len(set(captured)) == 8
    # one step of each bucket ran as it was, and those with prompts in them
    assert 0 < stats["graph_steps"] <= stats["steps"] - 5
    assert outcome(flat(engine.generate(PROMPTS, params))) == outcome(clean) and len(captured) == 8


def test_rows_that_wait_for_the_host_are_drawn_as_before(policy, captured):
    """Filters, bans and raw log-probs: the forward comes from a graph all the same, the draw does not."""
    for params in (
        mixed_params(2, 7),
        [SamplingParams(max_tokens=12, min_tokens=5, stop_token_ids=EVEN_IDS, seed=i) for i in range(7)],
        lengths(7, raw_logprobs=True),
    ):
        clean = flat(Engine(policy, None, without_graphs()).generate(PROMPTS, params))
        engine = Engine(policy, None, roomy())
        found = flat(engine.generate(PROMPTS, params))
        assert outcome(found) == outcome(clean)
        assert engine.stats["graph_steps"] > 0
        if params[0].raw_logprobs:
            assert [c.raw_logprobs.tolist() for c in found] == [c.raw_logprobs.tolist() for c in clean]
            assert not [what for what in captured if what.startswith("draw")][2:]


def test_siblings_fork_before_the_graph_runs(policy, captured):
    params = SamplingParams(max_tokens=10, n=4, seed=3)
    clean = flat(Engine(policy, None, without_graphs(page_size=8)).generate(PROMPTS[:2], params))
    engine = Engine(policy, None, roomy(page_size=8))
    assert outcome(flat(engine.generate(PROMPTS[:2], params))) == outcome(clean)
    assert engine.stats["page_copies"] > 0 and engine.stats["graph_steps"] > 0


def test_weights_in_place_keep_the_graphs_and_moved_ones_do_not(own_policy, captured):
    ours, params = own_policy(), lengths(3)
    engine = Engine(ours, None, roomy())
    first = outcome(flat(engine.generate(PROMPTS[:3], params)))
    weights = {name: (w * 1.5 if w.dim() > 1 else w) for name, w in ours.named_weights().items()}
    engine.update_weights(weights, 1)
    made = len(captured)
    second = outcome(flat(engine.generate(PROMPTS[:3], params)))
    assert second != first and len(captured) == made
    assert second == outcome(flat(Engine(ours, None, without_graphs()).generate(PROMPTS[:3], params)))
    parameter = next(iter(ours.model.parameters()))
    parameter.data = parameter.data.clone()
    assert outcome(flat(engine.generate(PROMPTS[:3], params))) == second and len(captured) == 2 * made
    layer = ours.model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)  # another parameter in its place, not written to
    engine.update_weights(ours.named_weights(), 2)
    third = outcome(flat(engine.generate(PROMPTS[:3], params)))
    assert third != second and len(captured) == 3 * made


def test_a_forward_that_somebody_replaced_is_not_replayed(own_policy, captured):
    ours, params = own_policy(), SamplingParams(max_tokens=6)
    engine = Engine(ours, None, roomy())
    clean = outcome(flat(engine.generate([[1, 2, 3]], params)))
    steps = engine.stats["graph_steps"]
    with kv_page_fault(ours):
        assert outcome(flat(engine.generate([[1, 2, 3]], params))) != clean
    assert engine.stats["graph_steps"] == steps > 0


def test_where_there_are_no_graphs_true_is_an_error_and_auto_is_not(policy):
    with pytest.raises(ValueError, match=r"engine\.cuda_graphs=true: there are no CUDA graphs on device cpu"):
        Engine(policy, None, roomy(cuda_graphs=True))
    for setting in ("auto", False):
        engine = Engine(policy, None, roomy(cuda_graphs=setting))
        engine.generate(PROMPTS[:1], SamplingParams(max_tokens=3))
        assert engine.stats["graph_steps"] == 0
        assert engine._runner.k_caches[0].shape[0] == engine.config.num_pages


def test_what_reads_on_the_host_is_not_captured(own_policy, monkeypatch):
    native = own_policy(backend="native")
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"engine\.cuda_graphs=true: the operators of backend 'native' read"):
        graphs.uses_graphs(True, native)
    assert not graphs.uses_graphs("auto", native)
    native.backend = "triton"
    assert native.why_not_captured() == "attention Sdpa can't be captured in a CUDA graph"
    for module in native.model.modules():
        if hasattr(module, "rlalign_attention"):
            module.rlalign_attention = Invariant()
    assert graphs.uses_graphs("auto", native) and graphs.uses_graphs(True, native)
    assert not graphs.uses_graphs(False, native)


@pytest.mark.parametrize("value", ["auto", True, False])
def test_the_setting_is_read_and_anything_else_is_refused(value):
    assert config_from_dict({"engine": {"cuda_graphs": value}}).engine.cuda_graphs == value
    with pytest.raises(ValueError, match="cuda_graphs"):
        config_from_dict({"engine": {"cuda_graphs": "sometimes"}})


def test_a_long_sequence_stays_within_the_model(policy, captured):
    engine = Engine(policy, None, roomy())
    [[completion]] = engine.generate([[1] * (MODEL_LIMIT - 5)], SamplingParams(max_tokens=50))
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    assert engine.stats["graph_steps"] == 3
