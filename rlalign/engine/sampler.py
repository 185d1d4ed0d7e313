"""Draws one token per row and brings tokens and log-probs to the host in a single transfer."""

from __future__ import annotations

import numpy as np
import torch
from rlalign_kernels import SampleOutput
from torch import Tensor

from rlalign.engine.batch_inputs import SamplingInputs
from rlalign.engine.request import Draw
from rlalign.modeling import Policy


@torch.no_grad()
def sample(policy: Policy, hidden: Tensor, inputs: SamplingInputs) -> list[Draw]:
    """One draw per row of hidden [N, H], its log-prob from the same call. Raises what ``draws_of`` raises."""
    output = policy.sample(
        hidden,
        inputs.rows,
        inputs.seeds,
        inputs.response_positions,
        banned=inputs.banned,
        raw_logprobs=inputs.raw_logprobs,
    )
    return draws_of(output, inputs)


def draws_of(output: SampleOutput, inputs: SamplingInputs) -> list[Draw]:
    """What was drawn, on the host.

    Raises FloatingPointError naming request and position where a log-prob is not finite.
    """
    tokens, logprobs, raw_logprobs = _to_host(output)
    _refuse_nonfinite(logprobs, inputs)
    # float32 → Python float → float32 is exact, so the 32 bits survive in lists.
    if raw_logprobs is None:
        return [Draw(*pair) for pair in zip(tokens.tolist(), logprobs.tolist(), strict=True)]
    return [Draw(*row) for row in zip(tokens.tolist(), logprobs.tolist(), raw_logprobs.tolist(), strict=True)]


def _to_host(output: SampleOutput) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Tokens int64 [N], log-probs float32 [N], raw ones or None: packed as int64 rows, the step's only sync."""
    floats = [output.logprob] if output.raw_logprob is None else [output.logprob, output.raw_logprob]
    packed = torch.stack([output.token, *(values.view(torch.int32).long() for values in floats)]).cpu().numpy()
    logprobs = [bits.astype(np.int32).view(np.float32) for bits in packed[1:]]
    return packed[0], logprobs[0], logprobs[1] if len(logprobs) == 2 else None


def _refuse_nonfinite(logprobs: np.ndarray, inputs: SamplingInputs) -> None:
    bad = np.flatnonzero(~np.isfinite(logprobs))
    if bad.size == 0:
        return
    request, sample_index = inputs.origins[bad[0]]
    raise FloatingPointError(
        f"request {request.request_id!r}, sample {sample_index}: the log-prob at response position "
        f"{request.num_response} (position {len(request.token_ids)} of the sequence) is {logprobs[bad[0]]}, "
        f"as in {bad.size} of {logprobs.size} rows of this step: weights or hidden states are not finite"
    )
