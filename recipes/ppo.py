"""PPO on a verifiable reward: a critic, several epochs and minibatches per batch, and the same proof at every step.

    python recipes/ppo.py                       a small model made on the spot learns to sort, on a CPU
    python recipes/ppo.py --help                settings that are often used

prompts -> rollout -> rewards -> recompute and verify -> advantages -> updates -> weight sync, and again. Weights change
within a batch here, so the log-probs are recomputed and verified before its first update.
"""

from __future__ import annotations

import hydra
from common import after_step, begin_batch, check, read_config, roll_out, started, verify
from omegaconf import DictConfig

from rlalign.algorithms.estimate import estimate_gae
from rlalign.algorithms.metrics import merge_updates, values
from rlalign.algorithms.minibatches import minibatches_of_step
from rlalign.cli.launch import finish, launch
from rlalign.config import Config
from rlalign.tasks import score_samples


def train(config: Config) -> None:
    """The whole run. Raises MismatchHalt when the two sides differ and ``align.on_mismatch`` says to stop."""
    algorithm = config.algorithm
    with started("ppo", config, estimator="gae") as job:
        run, actors, trainer = job.run, job.actors, job.actors.trainer
        for step in range(job.first_step, config.run.steps + 1):
            with run.phase("rollout"):
                rollout = roll_out(job, step)

            with run.phase("reward"), run.generators:
                samples = score_samples(job.task, rollout.samples)

            # The trainer sees token ids only; its log-probs are its own.
            with run.phase("train"):
                begin_batch(job, samples, step)
                train_logprobs, old_values = trainer.compute_logprobs(), trainer.compute_values()
                kl = {}
                if algorithm.kl_coef > 0:
                    kl = {"old_logprobs": train_logprobs, "ref_logprobs": trainer.reference_logprobs()}
                estimate = estimate_gae(samples, algorithm, old_values, **kl)

            with run.phase("check"):
                check(job, samples, step)

            with run.phase("verify"):
                verify(job, samples, train_logprobs, estimate.advantages)

            with run.uninterrupted():
                with run.phase("update"):
                    parts = []
                    for indices in minibatches_of_step(len(samples), algorithm, seed=config.run.seed, step=step):
                        result = trainer.accumulate(
                            indices,
                            estimate.advantages,
                            old_logprobs=train_logprobs,
                            values=old_values,
                            returns=estimate.returns,
                        )
                        parts.append(result.parts)
                        run.metrics |= trainer.apply_update()
                    run.metrics |= values(merge_updates(parts))
                with run.phase("sync"):
                    actors.sync_weights()
                run.end_step(step, samples, rollout_stats=rollout.stats)

            after_step(job, step)


@hydra.main(version_base="1.3", config_path="../conf", config_name="ppo")
def main(settings: DictConfig) -> None:
    finish(lambda: train(read_config(settings)))


if __name__ == "__main__":
    launch(main)
