"""The tensors of one step, built from what the scheduler decided.

Legend: T rows (tokens) of the forward, B sequences, P pages of the longest one, N drawn rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from rlalign_kernels import SamplingRows
from torch import Tensor

from rlalign.engine.request import Request
from rlalign.engine.scheduler import Chunk, ScheduledStep
from rlalign.engine.transfer import to_device
from rlalign.modeling import rows_of, sampling_arrays


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """What the model's forward needs. drawn_rows: int64 [N], rows whose hidden state draws a token."""

    token_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T]
    block_tables: Tensor  # int32 [B, P]; unused entries are 0 and never read
    cu_seqlens_q: Tensor  # int32 [B + 1]
    kv_lens: Tensor  # int32 [B]
    drawn_rows: Tensor
    page_copies: Tensor  # int64 [2, copies]: sources, destinations
    max_seqlen_q: int  # bounds of the two lengths above, known here without asking the device
    max_seqlen_k: int


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What drawing needs, one row per sample. ``origins`` names each row's (request, sample index)."""

    rows: SamplingRows
    seeds: Tensor  # int64 [N], the bits of an unsigned 64-bit key
    response_positions: Tensor  # int64 [N]
    banned: Tensor | None  # bool [N, V]
    raw_logprobs: bool
    origins: list[tuple[Request, int]]


def forward_inputs(step: ScheduledStep, page_size: int, device: torch.device) -> ForwardInputs:
    """Inputs of the step's forward: chunks one after another, without padding."""
    arrays = forward_arrays(step, page_size)
    return ForwardInputs(
        **to_device(arrays, device),
        max_seqlen_q=int(np.diff(arrays["cu_seqlens_q"]).max()),
        max_seqlen_k=int(arrays["kv_lens"].max()),
    )


def forward_arrays(step: ScheduledStep, page_size: int) -> dict[str, np.ndarray]:
    """The tensors of ``ForwardInputs`` on the host."""
    chunks = step.chunks
    lengths = np.array([chunk.num_tokens for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    ends = np.cumsum(lengths)
    sequence = np.repeat(np.arange(len(chunks)), lengths)  # of each row
    positions = np.arange(ends[-1]) - (ends - lengths - starts)[sequence]
    block_tables = _block_tables(chunks)
    return {
        "token_ids": np.fromiter(_tokens(chunks), dtype=np.int64, count=ends[-1]),
        "position_ids": positions,
        "slot_mapping": block_tables[sequence, positions // page_size] * np.int64(page_size) + positions % page_size,
        "block_tables": block_tables,
        "cu_seqlens_q": np.concatenate([[0], ends]).astype(np.int32),
        "kv_lens": (starts + lengths).astype(np.int32),
        "drawn_rows": np.repeat(ends - 1, [chunk.num_draws for chunk in chunks]),
        "page_copies": page_copies(step),
    }


def page_copies(step: ScheduledStep) -> np.ndarray:
    """int64 [2, copies]: sources, destinations."""
    return np.array(step.copies, dtype=np.int64).reshape(-1, 2).T.copy()


def sampling_inputs(step: ScheduledStep, vocab_size: int, device: torch.device) -> SamplingInputs | None:
    """Inputs of the step's draws in order of chunks, then samples; None if the step draws nothing."""
    origins = origins_of(step)
    if not origins:
        return None
    arrays = draw_arrays(origins)
    return as_sampling_inputs(origins, arrays, to_device(arrays, device), vocab_size)


def origins_of(step: ScheduledStep) -> list[tuple[Request, int]]:
    """Request and sample index of every draw."""
    return [
        (chunk.request, chunk.request.sample_index + index) for chunk in step.chunks for index in range(chunk.num_draws)
    ]


def draw_arrays(origins: list[tuple[Request, int]]) -> dict[str, np.ndarray]:
    """The tensors of ``SamplingInputs`` on the host: one entry per draw, but for ``bans``."""
    return {
        **sampling_arrays([request.params for request, _ in origins]),
        "seeds": np.array([request.seed_of(sample) for request, sample in origins], dtype=np.uint64).view(np.int64),
        "positions": np.array([request.num_response for request, _ in origins], dtype=np.int64),
        "bans": _bans([request for request, _ in origins]),
    }


def as_sampling_inputs(
    origins: list[tuple[Request, int]], arrays: Mapping[str, np.ndarray], moved: Mapping[str, Tensor], vocab_size: int
) -> SamplingInputs:
    """Of ``draw_arrays`` and the same where the draws are made."""
    settings = {name: arrays[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    return SamplingInputs(
        rows=rows_of(settings, moved),
        seeds=moved["seeds"],
        response_positions=moved["positions"],
        banned=_banned(moved["bans"], len(origins), vocab_size),
        raw_logprobs=any(request.params.raw_logprobs for request, _ in origins),
        origins=origins,
    )


def _tokens(chunks: list[Chunk]) -> Iterator[int]:
    return chain.from_iterable(c.request.token_ids[c.start : c.start + c.num_tokens] for c in chunks)


def _block_tables(chunks: list[Chunk]) -> np.ndarray:
    tables = np.zeros((len(chunks), max(len(chunk.request.pages) for chunk in chunks)), dtype=np.int32)
    for table, chunk in zip(tables, chunks, strict=True):
        table[: len(chunk.request.pages)] = chunk.request.pages
    return tables


def _bans(requests: list[Request]) -> np.ndarray:
    """int64 [2, K], rows and the ids that they must not draw: those of rows below their ``min_tokens``."""
    pairs = [(row, token_id) for row, request in enumerate(requests) for token_id in sorted(request.banned_ids)]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).T.copy()


def _banned(bans: Tensor, num_rows: int, vocab_size: int) -> Tensor | None:
    """Bool [N, V] of ``_bans``, made where they are; None if there are none."""
    if bans.shape[1] == 0:
        return None
    flat = bans[0] * vocab_size + bans[1]
    return (
        torch.zeros(num_rows * vocab_size, dtype=torch.bool, device=bans.device)
        .index_fill_(0, flat, True)
        .view(num_rows, vocab_size)
    )
