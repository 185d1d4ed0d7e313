"""A controller by itself: what it compares, whom it names, and what it does when a process is gone."""

from __future__ import annotations

import contextlib
import re
import threading
import time

import numpy as np
import pytest
import ray
from rlalign_kernels import Fingerprint
from support.actors import kill
from support.runs import tiny_run

from rlalign.actors import Controller, cluster, controller
from rlalign.actors.cluster import _check_address, fetch, start_actor
from rlalign.actors.controller import _merge
from rlalign.actors.weight_sync import WeightBundle
from rlalign.config import Config, SamplingParams
from rlalign.modeling import load_tokenizer, make_tiny_model
from rlalign.records import derive_seed
from rlalign.tasks import make_task
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.verifier.periodic import choose_excerpts

STEP = {"step": 1}


@pytest.fixture(scope="module")
def setting(shared_ray, tmp_path_factory):
    """A running controller with two rollout actors, its config and its task's prompts."""
    folder = tmp_path_factory.mktemp("controller")
    config = tiny_run(folder, cluster={"num_rollout_actors": 2})
    make_tiny_model(config.model, make_sort_tokenizer(max_value=9), folder / "model", seed=0)
    prompts = make_task(config.task, load_tokenizer(folder / "model"), seed=0).prompts("train")
    with Controller(config) as actors:
        actors.load(folder / "model")
        actors.sync_weights()
        yield actors, config, prompts


def outcome(rollout):
    return [(s.key, s.completion.token_ids.tolist(), s.completion.logprobs.tobytes()) for s in rollout.samples]


def test_samples_come_in_order_of_key_whoever_served_them(setting):
    actors, _, prompts = setting
    samples = actors.generate(prompts[:5], step=3).samples
    assert [s.key for s in samples] == [(3, p.prompt_id, j) for p in prompts[:5] for j in range(4)]
    assert len({s.completion.seed for s in samples}) == 20
    alone = [sample for prompt in prompts[:5] for sample in actors.generate([prompt], step=3).samples]
    assert [s.completion.token_ids.tolist() for s in samples] == [s.completion.token_ids.tolist() for s in alone]


def test_counts_of_the_engines_are_added_and_peaks_are_not():
    names = ("steps", "prefill_tokens", "decode_tokens", "prefix_hit_tokens", "prefix_query_tokens", "cache_use_peak")
    engines = [dict(zip(names, values, strict=True)) for values in ((4, 10, 20, 5, 10, 0.25), (6, 10, 10, 0, 10, 0.5))]
    assert _merge(engines) == {
        "engine/steps": 10, "engine/prefill_tokens": 20, "engine/decode_tokens": 30, "engine/tokens_per_forward": 5,
        "engine/prefix_hit_rate": 0.25, "engine/cache_use_peak": 0.5,
    }  # fmt: skip


def test_another_step_draws_other_samples(setting):
    actors, _, prompts = setting
    assert outcome(actors.generate(prompts[:4], step=1)) != outcome(actors.generate(prompts[:4], step=2))


def test_a_dead_actor_is_replaced_in_the_middle_of_a_rollout_and_its_planted_fault_again(setting):
    actors, _, prompts = setting
    clean = outcome(actors.generate(prompts[:6], **STEP))
    planted = outcome(actors.generate(prompts[:6], **STEP, plant_fault=True))
    restarts = actors.num_restarts
    kill(actors._rollouts[0])
    assert outcome(actors.generate(prompts[:6], **STEP, plant_fault=True)) == planted != clean
    assert actors.num_restarts == restarts + 1
    assert outcome(actors.generate(prompts[:6], **STEP)) == clean


def test_a_dead_actor_is_replaced_once_for_all_digests_that_were_asked(setting):
    actors, _, prompts = setting
    samples = actors.generate(prompts[:3], **STEP).samples
    excerpts = choose_excerpts(samples, count=4, tokens=4, seed=0, step=1)
    step = next(step for step in range(100) if derive_seed(actors.config.run.seed, step) % 2 == 0)
    restarts, before = actors.num_restarts, _digests(actors, step, excerpts)
    kill(actors._rollouts[0])
    assert _digests(actors, step, excerpts) == before
    assert actors.num_restarts == restarts + 1


def _digests(actors, step, excerpts):
    """Of the rollout's side; the trainer's have the same bits, asked ahead or when they are wanted."""
    rollout, train = actors.inspectors(step, ["logit_digests", "site_digests"], excerpts)
    later = actors.inspectors(step, [], excerpts)[1]
    found = [(side.logit_digests(excerpts).tolist(), side.site_digests(excerpts)) for side in (rollout, train, later)]
    plain = [(logits, sites.sites, sites.digests.tolist()) for logits, sites in found]
    assert plain[0] == plain[1] == plain[2]
    return plain[0]


def test_digests_asked_ahead_are_of_their_own_excerpts_only(setting):
    actors, _, prompts = setting
    samples = actors.generate(prompts[:3], **STEP).samples
    ahead, others = (choose_excerpts(samples, count=2, tokens=4, seed=seed, step=1) for seed in (0, 1))
    assert [one.name for one in ahead] != [one.name for one in others]
    for side in actors.inspectors(1, ["logit_digests"], ahead):
        assert side.logit_digests(others).tolist() != side.logit_digests(ahead).tolist()


def test_a_batch_tells_the_version_of_the_trainers_weights(setting):
    actors, _, prompts = setting
    samples = actors.generate(prompts[:2], **STEP).samples
    actors.begin_batch(samples)
    version = actors.trainer_version
    assert version == actors.weights_version
    actors.trainer.accumulate(range(len(samples)), [np.ones(len(s.completion.token_ids), np.float32) for s in samples])
    actors.trainer.apply_update()
    actors.begin_batch(samples)
    assert actors.trainer_version == version + 1 == actors.weights_version + 1
    actors.sync_weights()


def test_a_dead_actor_is_replaced_when_weights_arrive(setting):
    actors, _, prompts = setting
    before = outcome(actors.generate(prompts[:3], **STEP))
    kill(actors._rollouts[0])
    actors.sync_weights()
    assert actors.weights_equal and outcome(actors.generate(prompts[:3], **STEP)) == before


def odd_actor(config, start_seconds=0.0, load_seconds=0.0, plan=None):
    """Stands in for an actor; it may be slow to start, or to load."""

    class Odd:  # made here, so that its process gets it by value and imports nothing of ours, unless it has a plan
        def __init__(self):
            time.sleep(start_seconds)
            self.plan = plan

        def load(self, config, checkpoint):
            time.sleep(load_seconds)
            return self.plan

        def generate(self, requests, *, plant_fault):
            raise NotImplementedError

        def begin_batch(self, samples):
            raise NotImplementedError

    return start_actor(Odd, config.cluster)


@pytest.fixture
def with_second(setting, monkeypatch):
    """Puts an odd actor in the place of the second rollout actor; starting may take half a second from then on."""
    actors, config, _ = setting
    made = []

    def replace(**behaviour):
        made.append(odd_actor(config, **behaviour))
        if not behaviour.get("start_seconds"):
            ray.get(made[-1].__ray_ready__.remote())
        monkeypatch.setattr(actors, "_rollouts", [actors._rollouts[0], made[-1]])
        monkeypatch.setattr(cluster, "_START_SECONDS", 0.5)
        return made[-1]

    yield replace
    for handle in made:
        cluster.stop_actor(handle)


def test_an_actor_that_never_starts_is_named(setting, with_second):
    actors, *_ = setting
    with_second(start_seconds=3600.0)
    with pytest.raises(ValueError, match=r"within 0\.5 s: rollout actor 1\. Has the cluster room for 3 actors"):
        actors.load(actors._checkpoint)


def test_a_replacement_that_never_starts_is_named(setting, with_second, monkeypatch):
    actors, _, prompts = setting
    never = with_second(start_seconds=3600.0)
    cluster.stop_actor(with_second())
    monkeypatch.setattr(actors, "_start", lambda cls: never)
    with pytest.raises(ValueError, match=r"did not start within 0\.5 s: rollout actor 1"):
        actors.generate(prompts[:2], **STEP)


def test_loading_may_take_longer_than_starting(setting, with_second):
    actors, *_ = setting
    with_second(load_seconds=1.5, plan=actors.plan)
    actors.load(actors._checkpoint)


def test_an_actor_that_dies_while_loading_is_named(setting, with_second):
    actors, *_ = setting
    dying = with_second(load_seconds=3600.0)
    threading.Timer(0.5, cluster.stop_actor, [dying]).start()
    with pytest.raises(RuntimeError, match="rollout actor 1 died"):
        actors.load(actors._checkpoint)


def test_weights_that_arrive_damaged_are_refused(setting):
    actors, *_ = setting
    bundle: WeightBundle = fetch(actors._weights)
    name = next(iter(bundle.buffers))
    damaged = bundle.buffers[name].copy()
    damaged[0] ^= 1
    wrong = WeightBundle(1, bundle.sha256, {**bundle.buffers, name: damaged}, bundle.layout)
    with pytest.raises(ValueError, match="arrived damaged"):
        fetch(actors._rollouts[0].load_weights.remote(wrong))


def test_an_actors_exception_arrives_as_itself(setting):
    actors, *_ = setting
    with pytest.raises(ValueError, match="this trainer was made without a critic") as raised:
        actors.trainer.compute_values()
    assert type(raised.value) is ValueError
    assert any("trainer_actor" in note for note in raised.value.__notes__), "its traceback is kept for who asks"


def test_a_plan_that_differs_is_named_field_by_field(setting):
    actors, *_ = setting
    fields = dict(actors.plan.fields)
    other = Fingerprint({**fields, "cpu.threads": "64"})
    with pytest.raises(RuntimeError, match=re.escape("rollout actor 1") + r".*cpu\.threads: 1 != 64"):
        actors._check_plan(other, 1)


def test_every_process_has_the_threads_that_were_asked_for(setting):
    actors, *_ = setting
    assert actors.plan.fields["cpu.threads"] == "1"


@pytest.mark.parametrize("setting_of", [{"n": 2}, {"seed": 1}, {"raw_logprobs": True}])
def test_settings_that_the_controller_decides_are_refused(setting_of):
    with pytest.raises(ValueError, match=r"algorithm\.group_size"):
        Controller(Config(sampling=SamplingParams(**setting_of)))


def test_a_cache_too_small_for_a_model_still_to_be_made_is_refused_before_it_is(tmp_path):
    engine = {"num_pages": 2, "page_size": 4}
    with pytest.raises(ValueError, match=r"num_pages=2 with page_size=4 hold 8 tokens.* needs num_pages=16$"):
        Controller(tiny_run(tmp_path, engine=engine))
    Controller(tiny_run(tmp_path, engine=engine, model={"path": str(tmp_path)}))


def test_actors_that_have_started_are_stopped_if_another_cannot(tmp_path, monkeypatch):
    stopped, names = [], iter(["trainer", "first"])

    def start(cls, *_, **__):
        if (name := next(names, None)) is None:
            raise OSError("no more processes")
        return name

    monkeypatch.setattr(controller, "cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(controller, "start_actor", start)
    monkeypatch.setattr(controller, "stop_actor", stopped.append)
    with pytest.raises(OSError, match="no more"), Controller(tiny_run(tmp_path, cluster={"num_rollout_actors": 2})):
        pass
    assert stopped == ["first", "trainer"]


def test_an_address_where_nobody_answers():
    with pytest.raises(ValueError, match=r"cluster\.address=127\.0\.0\.1:1: nobody answers there"):
        _check_address("127.0.0.1:1")


def test_a_dead_trainer_ends_the_run_with_its_name(setting, monkeypatch):
    actors, config, _ = setting
    stand_in = odd_actor(config)
    monkeypatch.setattr(actors.trainer, "_handle", stand_in)
    kill(stand_in)
    with pytest.raises(RuntimeError, match="the trainer actor died"):
        actors.begin_batch([])
