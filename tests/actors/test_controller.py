"""A controller by itself: what it compares, whom it names, and what it does when a process is gone."""

from __future__ import annotations

import re

import pytest
import ray
from rlalign_kernels import Fingerprint
from support.runs import tiny_run

from rlalign.actors import Controller
from rlalign.actors.cluster import _check_address, fetch
from rlalign.actors.weight_sync import WeightBundle
from rlalign.config import Config, SamplingParams
from rlalign.modeling import load_tokenizer, make_tiny_model
from rlalign.tasks import make_task
from rlalign.tasks.sort import make_sort_tokenizer

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


def test_another_step_draws_other_samples(setting):
    actors, _, prompts = setting
    assert outcome(actors.generate(prompts[:4], step=1)) != outcome(actors.generate(prompts[:4], step=2))


def test_a_dead_actor_is_replaced_in_the_middle_of_a_rollout(setting):
    actors, _, prompts = setting
    before = outcome(actors.generate(prompts[:6], **STEP))
    restarts = actors.num_restarts
    ray.kill(actors._rollouts[1])
    assert outcome(actors.generate(prompts[:6], **STEP)) == before
    assert actors.num_restarts == restarts + 1


def test_a_dead_actor_is_replaced_when_weights_arrive(setting):
    actors, _, prompts = setting
    before = outcome(actors.generate(prompts[:3], **STEP))
    ray.kill(actors._rollouts[0])
    actors.sync_weights()
    assert actors.weights_equal and outcome(actors.generate(prompts[:3], **STEP)) == before


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


def test_an_address_where_nobody_answers():
    with pytest.raises(ValueError, match=r"cluster\.address=127\.0\.0\.1:1: nobody answers there"):
        _check_address("127.0.0.1:1")


def test_a_dead_trainer_ends_the_run_with_its_name(setting):
    actors, *_ = setting  # the last test of this file: nothing works after it
    ray.kill(actors._trainer_handle)
    with pytest.raises(RuntimeError, match="the trainer actor died"):
        actors.trainer.version()
