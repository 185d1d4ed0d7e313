"""GRPO on a verifiable reward, with rollout and trainer proven equal at every step.

    python recipes/grpo.py                      a small model made on the spot learns to sort, on a CPU
    python recipes/grpo.py numerics=native      the same on ordinary operators: now the two sides differ
    python recipes/grpo.py --help               settings that are often used

prompts -> rollout -> rewards -> forward and backward -> verify -> update -> weight sync, and again.
"""

from __future__ import annotations

import hydra
from common import after_step, begin_batch, check, read_config, roll_out, started, verify
from omegaconf import DictConfig

from rlalign.algorithms.estimate import estimate_grpo
from rlalign.algorithms.metrics import merge_updates, values
from rlalign.algorithms.minibatches import minibatches_of_step
from rlalign.cli.launch import finish, launch
from rlalign.config import Config
from rlalign.tasks import score_samples


def train(config: Config) -> None:
    """The whole run. Raises MismatchHalt when the two sides differ and ``align.on_mismatch`` says to stop."""
    algorithm = config.algorithm
    one_update = algorithm.epochs * algorithm.minibatches == 1
    with started("grpo", config, estimator="grpo") as job:
        run, actors, trainer = job.run, job.actors, job.actors.trainer
        for step in range(job.first_step, config.run.steps + 1):
            with run.phase("rollout"):
                rollout = roll_out(job, step)

            with run.phase("reward"), run.generators:
                samples = score_samples(job.task, rollout.samples)
                estimate = estimate_grpo(samples, algorithm)
                advantages = estimate.advantages
                run.note_signal(estimate.no_signal_frac)

            # The trainer sees token ids only; its log-probs are its own. With one update per batch, the forward that
            # is trained on is the one that is verified.
            with run.phase("train"):
                begin_batch(job, samples, step)
                reference = trainer.reference_logprobs() if algorithm.kl_coef > 0 else None
                if one_update:
                    result = trainer.accumulate(range(len(samples)), advantages, ref_logprobs=reference)
                    train_logprobs = result.train_logprobs
                else:
                    train_logprobs = trainer.compute_logprobs()

            with run.phase("check"):
                check(job, samples, step)

            with run.phase("verify"):
                verify(job, samples, train_logprobs, advantages)

            with run.uninterrupted():
                with run.phase("update"):
                    if one_update:
                        run.metrics |= result.metrics | trainer.apply_update()
                    else:
                        parts = []
                        for indices in minibatches_of_step(len(samples), algorithm, seed=config.run.seed, step=step):
                            result = trainer.accumulate(
                                indices, advantages, old_logprobs=train_logprobs, ref_logprobs=reference
                            )
                            parts.append(result.parts)
                            run.metrics |= trainer.apply_update()
                        run.metrics |= values(merge_updates(parts))
                with run.phase("sync"):
                    actors.sync_weights()
                run.end_step(step, samples, rollout_stats=rollout.stats)

            after_step(job, step)


@hydra.main(version_base="1.3", config_path="../conf", config_name="grpo")
def main(settings: DictConfig) -> None:
    finish(lambda: train(read_config(settings)))


if __name__ == "__main__":
    launch(main)
