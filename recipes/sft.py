"""Supervised learning on a task's demonstrations, on the same operators, packing and optimizer as RL.

    python recipes/sft.py                       a small model made on the spot imitates demonstrations of sorting
    python recipes/sft.py --help                settings that are often used

The RL recipes call ``warm_start`` for a model made on the spot. The demonstrations of the built-in task mix four habits
(ascending, descending, copied, reversed), so that a model which imitates them can sort, but does so only a quarter of
the time: which habit is wanted is left for the reward to teach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig

from rlalign.actors.process import policy_settings, set_up
from rlalign.cli.launch import finish, launch
from rlalign.config import Config, SamplingParams, TrainerConfig, config_from_dict
from rlalign.engine import Engine
from rlalign.modeling import Policy, load_policy, load_tokenizer, make_tiny_model, save_checkpoint
from rlalign.records import Prompt, Sample
from rlalign.run.folder import RunFolder
from rlalign.run.order import prompts_of_step
from rlalign.tasks import Task, make_task, score_samples
from rlalign.tasks.byte_tokenizer import make_byte_tokenizer
from rlalign.tasks.plugin import load_reward
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.trainer import SftTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def imitate(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: TrainerConfig,
    *,
    steps: int,
    batch: int,
    seed: int,
) -> Iterator[tuple[int, dict[str, float]]]:
    """One supervised step per iteration, on ``batch`` demonstrations; yields (step, metrics)."""
    trainer = SftTrainer(policy, config, total_steps=steps)
    for step in range(1, steps + 1):
        prompts = prompts_of_step(task.prompts("train"), step=step, count=batch, seed=seed)
        answers = [tokenizer(task.demonstration(prompt), add_special_tokens=False)["input_ids"] for prompt in prompts]
        pairs = [(p.token_ids, [*ids, tokenizer.eos_token_id]) for p, ids in zip(prompts, answers, strict=True)]
        yield step, trainer.step(pairs)


def warm_start(config: Config, path: Path, *, say: Callable[[str], None]) -> None:
    """Make a small model for the task at ``path``, teach it the task's demonstrations, and save it there."""
    model = config.model
    if model.warm_start_steps == 0:
        _fresh_checkpoint(config, path)
        say("random weights: no warm start (model.warm_start_steps=0)")
        return
    policy, tokenizer, task = _fresh_policy(config, path)
    # the trainer's settings are meant for RL: only what fits into memory is shared with it
    trainer = TrainerConfig(lr=model.warm_start_lr, micro_batch_tokens=config.trainer.micro_batch_tokens)
    say(f"warm start: {model.warm_start_steps} supervised steps on mixed demonstrations, to begin below 0.3 reward")
    for step, metrics in imitate(
        policy, tokenizer, task, trainer,
        steps=model.warm_start_steps, batch=model.warm_start_batch, seed=config.run.seed,
    ):  # fmt: skip
        if step % 100 == 0 or step == model.warm_start_steps:
            say(f"warm start {step}/{model.warm_start_steps}  loss {metrics['loss']:.3f}")
    save_checkpoint(policy.model, tokenizer, path)
    if policy.device.type == "cuda":
        del policy
        torch.cuda.empty_cache()  # the actors want this GPU's memory


def train(config: Config) -> None:
    """The stand-alone recipe: all of it in this process, without actors."""
    set_up(config.cluster.threads)
    check_files(config)
    policy_settings(config)  # a GPU or attention that isn't there is an error before there is a folder
    folder = RunFolder.create("sft", config)
    if config.model.path is None:
        policy, tokenizer, task = _fresh_policy(config, folder.initial)
    else:
        policy = _load(config, config.model.path)
        tokenizer = load_tokenizer(config.model.path)
        task = make_task(config.task, tokenizer, seed=config.run.seed)
    before = accuracy(policy, tokenizer, task, config)
    print(f"held-out accuracy before: {before:.3f}", flush=True)
    for step, metrics in imitate(
        policy, tokenizer, task, config.trainer,
        steps=config.run.steps, batch=config.model.warm_start_batch, seed=config.run.seed,
    ):  # fmt: skip
        print(f"step {step}/{config.run.steps}  loss {metrics['loss']:.4f}", flush=True)
    after = accuracy(policy, tokenizer, task, config)
    save_checkpoint(policy.model, tokenizer, folder.last)
    folder.write_json(folder.summary, {"steps": config.run.steps, "eval_first": before, "eval_last": after})
    print(f"held-out accuracy after: {after:.3f}\ncheckpoint: {folder.last}", flush=True)


def accuracy(policy: Policy, tokenizer: PreTrainedTokenizerBase, task: Task, config: Config) -> float:
    """Mean reward of greedy responses to held-out prompts. Raises ValueError if one can't be served."""
    prompts = held_out(task, config)
    greedy = SamplingParams(temperature=0.0, max_tokens=config.sampling.max_tokens)
    groups = Engine(policy, tokenizer, config.engine).generate([p.token_ids.tolist() for p in prompts], greedy)
    samples = [Sample(0, prompt, group[0], greedy) for prompt, group in zip(prompts, groups, strict=True)]
    for sample in samples:
        if sample.completion.error is not None:
            raise ValueError(f"held-out prompt {sample.prompt.prompt_id}: {sample.completion.error}")
    return sum(sample.reward for sample in score_samples(task, samples)) / len(samples)


def held_out(task: Task, config: Config) -> list[Prompt]:
    """The first ``eval.num_prompts`` held-out prompts. Raises ValueError when there are fewer."""
    prompts = task.prompts("eval")
    if config.eval.num_prompts > len(prompts):
        raise ValueError(
            f"eval.num_prompts={config.eval.num_prompts}, but there are only {len(prompts)} held-out prompts "
            f"(task.num_eval={config.task.num_eval}, of a file those that it has to spare)"
        )
    return prompts[: config.eval.num_prompts]


def validated(settings: DictConfig) -> Config:
    """The command line's settings. Raises ValueError for one that is bad or missing, naming what asks for it."""
    if missing := sorted(OmegaConf.missing_keys(settings)):
        choices = HydraConfig.get().runtime.choices
        groups = [name.partition(".")[0] for name in missing]
        needs = [
            f"{name} is required with {group}={choices[group]}" for name, group in zip(missing, groups, strict=True)
        ]
        raise ValueError("; ".join(needs))
    return config_from_dict(OmegaConf.to_container(settings, resolve=True))


def check_files(config: Config) -> None:
    """Say what is missing or unusable before anything is started. Raises FileNotFoundError or ValueError."""
    if config.model.path is not None and not (config.model.path / "config.json").is_file():
        raise FileNotFoundError(f"model.path={config.model.path}: no such folder, or no config.json in it")
    for name in ("path", "eval_path"):
        file = getattr(config.task, name)
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"task.{name}={file}: no such file")
    if config.task.reward is not None:
        load_reward(config.task.reward)
    if config.model.path is None:
        _check_words(config)
    limit, positions = config.engine.max_model_len, _max_positions(config)
    if limit is not None and positions is not None and limit > positions:
        raise ValueError(f"engine.max_model_len={limit}: the model has {positions} positions")


def _max_positions(config: Config) -> int | None:
    """Of the model that the settings name; None if its config.json doesn't say."""
    if config.model.path is None:
        return config.model.max_position_embeddings
    return getattr(
        AutoConfig.from_pretrained(config.model.path, local_files_only=True), "max_position_embeddings", None
    )


def _fresh_policy(config: Config, path: Path) -> tuple[Policy, PreTrainedTokenizerBase, Task]:
    """A random model for the task, written to ``path`` and loaded from there like any other."""
    _fresh_checkpoint(config, path)
    tokenizer = load_tokenizer(path)
    return _load(config, path), tokenizer, make_task(config.task, tokenizer, seed=config.run.seed)


def _fresh_checkpoint(config: Config, path: Path) -> None:
    """A random model with a tokenizer for the task, written to ``path``."""
    _check_words(config)
    size = config.model.vocab_size
    tokenizer = make_sort_tokenizer(max_value=config.task.max_value) if size is None else make_byte_tokenizer(size)
    make_tiny_model(config.model, tokenizer, path, seed=config.run.seed)


def _check_words(config: Config) -> None:
    """Raises ValueError unless a model made on the spot would know the task's words, and no others."""
    name, size = config.task.name, config.model.vocab_size
    if name != "sort" and size is None:
        raise ValueError(
            f"task={name} needs model.path, or model.vocab_size for a model made on the spot: without it such a model "
            "only knows digits"
        )
    if name == "sort" and size is not None:
        raise ValueError(f"model.vocab_size={size} means nothing to task=sort, which has words of its own")


def _load(config: Config, path: Path) -> Policy:
    return load_policy(path, **policy_settings(config))


@hydra.main(version_base="1.3", config_path="../conf", config_name="sft")
def main(settings: DictConfig) -> None:
    finish(lambda: train(validated(settings)))


if __name__ == "__main__":
    launch(main)
