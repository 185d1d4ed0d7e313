"""Advantages from rewards: normalised within a prompt's group, or by generalised advantage estimation.

    group_normalized:  A_i = (R_i - mean_g) [ / (std_g + eps) ]          over the samples i of one prompt g
    gae:               d_t = r_t + gamma v_{t+1} - v_t,  A_t = d_t + gamma lambda A_{t+1},  R_t = A_t + v_t

mean_g and std_g divide by the number of samples in the group (population, not n - 1).
Both compute in float64 and round once to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def group_normalized(
    rewards: torch.Tensor, prompt_ids: Sequence[int], *, normalize_std: bool = True, eps: float = 1e-6
) -> torch.Tensor:
    """Advantage of every sample, float32 [N]; a group whose rewards are all equal gets exactly 0.

    rewards: [N], finite. prompt_ids: N integers; equal ids form a group, wherever they stand. The sums are correctly
    rounded (``math.fsum``), so the result depends on neither the order of samples nor that of groups.
    Raises ValueError for a non-finite reward and for a group of one, whose advantage would always be 0.
    """
    if rewards.dim() != 1 or len(prompt_ids) != len(rewards):
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, prompt_ids {len(prompt_ids)} entries")
    groups: dict[int, list[int]] = {}
    for index, prompt_id in enumerate(prompt_ids):
        groups.setdefault(int(prompt_id), []).append(index)
    exact = [float(reward) for reward in rewards.tolist()]
    advantages = [0.0] * len(exact)
    for prompt_id, members in groups.items():
        normalized = _normalize([exact[index] for index in members], prompt_id, normalize_std, eps)
        for index, advantage in zip(members, normalized, strict=True):
            advantages[index] = advantage
    return torch.tensor(advantages, dtype=torch.float64).float()


def _normalize(rewards: list[float], prompt_id: int, normalize_std: bool, eps: float) -> list[float]:
    if not all(map(math.isfinite, rewards)):
        raise ValueError(f"prompt {prompt_id}: rewards {rewards} are not all finite")
    if len(rewards) < 2:
        raise ValueError(f"prompt {prompt_id} has 1 sample: a group needs at least 2 to be normalised over")
    # Equal rewards carry no signal; their rounded mean may differ from them, and x / eps would blow that up.
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if not normalize_std:
        return centred
    std = math.sqrt(math.fsum(value * value for value in centred) / len(centred))
    return [value / (std + eps) for value in centred]


def gae(
    rewards: torch.Tensor, values: torch.Tensor, *, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns of one sequence, float32 [L] each, from per-token rewards and values [L].

    v_t is the value of the state before token t. The response's end is terminal (v_{L} = 0), also when the length
    limit cut it: the reward has then already been given for what was written.
    """
    if rewards.dim() != 1 or rewards.shape != values.shape:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}, values {tuple(values.shape)}; expected both [L]")
    reward, value = rewards.double().tolist(), values.double().tolist()
    advantages = [0.0] * len(reward)
    next_value = next_advantage = 0.0
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * next_value - value[t]
        next_advantage = advantages[t] = delta + gamma * gae_lambda * next_advantage
        next_value = value[t]
    exact = torch.tensor(advantages, dtype=torch.float64)
    return exact.float(), (exact + values.double()).float()
