"""PPO on a verifiable reward: a critic, several epochs and minibatches per batch, and the same proof at every step.

    python recipes/ppo.py                       a small model made on the spot learns to sort, on a CPU
    python recipes/ppo.py --help                settings that are often used

prompts -> rollout -> rewards -> recompute and verify -> advantages -> updates -> weight sync, and again. Weights change
within a batch here, so the log-probs are recomputed and verified before its first update.
"""

from __future__ import annotations

import hydra
from common import evaluate, initial_checkpoint, read_config
from omegaconf import DictConfig

from rlalign.actors import Controller
from rlalign.algorithms.estimate import estimate_gae
from rlalign.algorithms.metrics import merge, values
from rlalign.algorithms.minibatches import split_minibatches
from rlalign.cli.launch import finish, launch
from rlalign.config import Config
from rlalign.modeling import load_tokenizer
from rlalign.records import derive_seed
from rlalign.run import Run, check_estimator, prompts_of_step
from rlalign.tasks import make_task, score_samples
from rlalign.trainer.checkpoint import existing_folder
from rlalign.verifier.metrics import Provenance


def train(config: Config) -> None:
    """The whole run. Raises MismatchHalt when the two sides differ and ``align.on_mismatch`` says to stop."""
    check_estimator(config, "ppo", "gae")
    algorithm, seed = config.algorithm, config.run.seed
    actors = Controller(config)
    with Run("ppo", config, find_checkpoint=existing_folder) as run, actors:
        trainer = actors.trainer
        checkpoint = initial_checkpoint(config, run)
        tokenizer = load_tokenizer(checkpoint)
        task = make_task(config.task, tokenizer, seed=seed)
        actors.load(checkpoint)
        done = run.restore(trainer)
        actors.sync_weights()
        run.facts |= actors.facts()

        with run.saved_on_interrupt(trainer):
            # before the first step, or where an interrupt came in between
            if run.evaluation_due():
                run.evaluated(evaluate(actors, task, run), trainer)
                if done > 0:
                    run.save(trainer)

            for step in range(done + 1, config.run.steps + 1):
                fault = config.align.fault.kind if step == config.align.fault.step else "none"

                with run.phase("rollout"):
                    prompts = prompts_of_step(
                        task.prompts("train"), step=step, count=algorithm.prompts_per_step, seed=seed
                    )
                    rollout = actors.generate(prompts, step=step, plant_fault=fault == "kv_page")
                    run.note_failed(rollout.failed, served=len(rollout.samples))

                with run.phase("reward"), run.generators:
                    samples = score_samples(task, rollout.samples)

                # The trainer sees token ids only; its log-probs are its own.
                with run.phase("train"):
                    trainer.begin_batch(samples)
                    if fault in ("trainer_weight", "position"):
                        run.progress.say(f"fault planted: {trainer.plant_fault(fault)}")
                    train_logprobs = trainer.compute_logprobs()
                    reference = trainer.reference_logprobs() if algorithm.kl_coef > 0 else None
                    old_values = trainer.compute_values()
                    estimate = estimate_gae(
                        samples,
                        algorithm,
                        old_values,
                        old_logprobs=train_logprobs if algorithm.kl_coef > 0 else None,
                        ref_logprobs=reference,
                    )

                with run.phase("verify"):
                    run.verify(
                        samples,
                        train_logprobs,
                        advantages=estimate.advantages,
                        provenance=Provenance(trainer.version(), actors.weights_equal, actors.weights_version),
                        decode=tokenizer.decode,
                    )

                with run.uninterrupted():
                    with run.phase("update"):
                        parts = []
                        for epoch in range(algorithm.epochs):
                            order = derive_seed(seed, step, epoch)
                            for indices in split_minibatches(len(samples), algorithm.minibatches, seed=order):
                                result = trainer.accumulate(
                                    indices,
                                    estimate.advantages,
                                    old_logprobs=train_logprobs,
                                    values=old_values,
                                    returns=estimate.returns,
                                )
                                parts.append(result.parts)
                                run.metrics |= trainer.apply_update()
                        run.metrics |= values(merge(parts))
                    with run.phase("sync"):
                        actors.sync_weights()
                    run.end_step(step, samples, rollout_stats=rollout.stats)

                if run.evaluation_due():
                    run.evaluated(evaluate(actors, task, run), trainer)
                if step == config.run.steps or step % config.run.save_every == 0:
                    run.save(trainer)

        run.facts |= actors.facts()
        run.finish(trainer.masters_sha256())


@hydra.main(version_base="1.3", config_path="../conf", config_name="ppo")
def main(settings: DictConfig) -> None:
    finish(lambda: train(read_config(settings)))


if __name__ == "__main__":
    launch(main)
