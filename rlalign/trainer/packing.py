"""Samples into padding-free micro-batches, by sample key and config alone.

A sequence of P prompt and L response tokens takes P + L - 1 rows: its last token predicts nothing and is not fed.
Response token j is predicted by row P - 1 + j, so a sequence's last L rows are those that are scored.
Legend: T rows of a micro-batch, B sequences in it, N rows that predict a response token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from rlalign_kernels import SamplingRows
from torch import Tensor

from rlalign.config import SamplingParams
from rlalign.modeling import sampling_rows
from rlalign.records import Sample


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One sequence to score or train on: prompt_ids int64 [P >= 1], response_ids int64 [L], and how it was sampled.

    banned_ids: what the first ``sampling.min_tokens`` response tokens could not be (whatever would have stopped the
    response). ``name`` is what an error calls the pair.
    """

    prompt_ids: np.ndarray
    response_ids: np.ndarray
    sampling: SamplingParams
    name: str
    banned_ids: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch. Sequences stand one after another; ``owners`` are indices into the caller's list.

    token_ids, position_ids: int64 [T]. cu_seqlens: int32 [B + 1], row at which each sequence starts. max_seqlen: rows
    of the longest one.
    predict_rows: int64 [N], ascending. targets: int64 [N]. sequence_lengths: int64 [N], the response length L of
    the sequence that the row belongs to. rows: sampling parameters [N]. truncated_rows: int64 [M], indices into N of
    rows whose support can be smaller than the vocabulary. ban_rows, ban_ids: int64 [K], pairs of a row in N and an id
    that it could not be. owners, response_lengths, truncated: one entry per sequence.
    """

    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    predict_rows: Tensor
    targets: Tensor
    sequence_lengths: Tensor
    rows: SamplingRows
    truncated_rows: Tensor
    ban_rows: Tensor
    ban_ids: Tensor
    owners: tuple[int, ...]
    response_lengths: tuple[int, ...]
    truncated: tuple[bool, ...]

    @property
    def owner(self) -> Tensor:
        """The caller's index of the sequence behind every predicting row, int64 [N] on the CPU."""
        return torch.repeat_interleave(torch.tensor(self.owners), torch.tensor(self.response_lengths))

    def gather(self, name: str, arrays: Sequence[np.ndarray]) -> Tensor:
        """Per-sample arrays [L] of the caller's list as one float32 tensor [N] in this batch's order."""
        parts = []
        for index, length in zip(self.owners, self.response_lengths, strict=True):
            if arrays[index].shape != (length,):
                raise ValueError(f"{name}[{index}] has shape {arrays[index].shape}; the response has {length} tokens")
            parts.append(arrays[index])
        packed = np.concatenate(parts).astype(np.float32, copy=False)
        return torch.from_numpy(packed).to(self.token_ids.device)

    def scatter(self, values: Tensor, arrays: list[np.ndarray]) -> None:
        """Write ``values`` float32 [N] into the caller's list, one array [L] per sequence, bit for bit."""
        pieces = values.detach().cpu().split(list(self.response_lengths))
        for index, piece in zip(self.owners, pieces, strict=True):
            arrays[index] = piece.numpy().copy()


def pack_samples(
    samples: Sequence[Sample],
    *,
    micro_batch_tokens: int,
    vocab_size: int,
    max_positions: int,
    eos_ids: Collection[int] | None = None,
    device: torch.device | str = "cpu",
) -> list[PackedBatch]:
    """Micro-batches of ``samples`` in order of ``Sample.key``: the caller's order reaches nothing but ``owners``.

    eos_ids: ids that end a response unless ``ignore_eos``; needed for samples with ``min_tokens``, which bans them.
    Raises ValueError naming the sample for two samples of one key, and for what ``pack`` refuses.
    """
    order = sorted(range(len(samples)), key=lambda index: samples[index].key)
    for before, after in pairwise(order):
        if samples[before].key == samples[after].key:
            raise ValueError(f"two samples have the key {samples[after].key} (step, prompt, sample): no order is fixed")
    return pack(
        [_pair(sample, eos_ids) for sample in samples],
        order=order,
        micro_batch_tokens=micro_batch_tokens,
        vocab_size=vocab_size,
        max_positions=max_positions,
        device=device,
    )


def _pair(sample: Sample, eos_ids: Collection[int] | None) -> TokenPair:
    completion, sampling, name = sample.completion, sample.sampling, f"sample {sample.key}"
    return TokenPair(
        completion.prompt_ids, completion.token_ids, sampling, name, banned_ids(sampling, eos_ids, name)
    )  # fmt: skip


def banned_ids(sampling: SamplingParams, eos_ids: Collection[int] | None, name: str) -> tuple[int, ...]:
    """What the first ``min_tokens`` tokens could not be. ValueError naming ``name`` if ``eos_ids`` is missing."""
    if sampling.min_tokens == 0:
        return ()
    if eos_ids is None and not sampling.ignore_eos:
        raise ValueError(
            f"{name} was drawn with min_tokens={sampling.min_tokens}, which bans the end of sequence: "
            "give eos_ids to score it"
        )
    return tuple(sorted({*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_ids or ())}))


def pack(
    pairs: Sequence[TokenPair],
    *,
    micro_batch_tokens: int,
    vocab_size: int,
    max_positions: int,
    order: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> list[PackedBatch]:
    """Greedy packing of ``pairs`` in ``order`` (default: as given): a micro-batch is closed when the next doesn't fit.

    A micro-batch holds at most ``micro_batch_tokens`` rows; a longer sequence gets one of its own. Pairs without a
    response token are left out. Raises ValueError naming the pair for an empty prompt, for more rows than
    ``max_positions`` and for a token id outside [0, vocab_size).
    """
    order = range(len(pairs)) if order is None else order
    for index in order:
        _check(pairs[index], vocab_size, max_positions)
    with_response = [index for index in order if len(pairs[index].response_ids)]
    return [_assemble(pairs, group, device) for group in _greedy(pairs, with_response, micro_batch_tokens)]


def _greedy(pairs: Sequence[TokenPair], order: Sequence[int], budget: int) -> Iterator[list[int]]:
    group: list[int] = []
    rows = 0
    for index in order:
        if group and rows + pairs[index].num_rows > budget:
            yield group
            group, rows = [], 0
        group.append(index)
        rows += pairs[index].num_rows
    if group:
        yield group


def _check(pair: TokenPair, vocab_size: int, max_positions: int) -> None:
    if len(pair.prompt_ids) == 0:
        raise ValueError(f"{pair.name} has an empty prompt: nothing predicts its first response token")
    if pair.num_rows > max_positions:
        raise ValueError(f"{pair.name} needs {pair.num_rows} positions; the model has max_positions={max_positions}")
    # Here rather than in the embedding, whose error on a GPU is an assertion without a name.
    for what, ids in (("prompt", pair.prompt_ids), ("response", pair.response_ids)):
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
            bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
            raise ValueError(f"{pair.name}: {what} token id {bad} is outside the vocabulary of {vocab_size}")


def _assemble(pairs: Sequence[TokenPair], group: list[int], device: torch.device | str) -> PackedBatch:
    members = [pairs[index] for index in group]
    ends = np.cumsum([pair.num_rows for pair in members])
    lengths = [len(pair.response_ids) for pair in members]
    truncated = [pair.sampling.truncated for pair in members]
    per_row = [pair.sampling for pair, length in zip(members, lengths, strict=True) for _ in range(length)]
    ids = [np.concatenate([pair.prompt_ids, pair.response_ids[:-1]]) for pair in members]
    bans = _bans(members, lengths)

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device)

    return PackedBatch(
        token_ids=tensor(ids),
        position_ids=tensor([np.arange(pair.num_rows) for pair in members]),
        cu_seqlens=torch.tensor([0, *ends.tolist()], dtype=torch.int32, device=device),
        max_seqlen=max(pair.num_rows for pair in members),
        predict_rows=tensor([np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]),
        targets=tensor([pair.response_ids for pair in members]),
        sequence_lengths=tensor([np.full(n, n) for n in lengths]),
        rows=sampling_rows(per_row, device),
        truncated_rows=tensor([np.flatnonzero(np.repeat(truncated, lengths))]),
        ban_rows=tensor([bans[:, 0]]),
        ban_ids=tensor([bans[:, 1]]),
        owners=tuple(group),
        response_lengths=tuple(lengths),
        truncated=tuple(truncated),
    )


def _bans(members: Sequence[TokenPair], lengths: Sequence[int]) -> np.ndarray:
    """(row, id) pairs, int64 [K, 2]: response tokens before ``min_tokens`` could not be one of ``banned_ids``."""
    starts = np.cumsum([0, *lengths[:-1]])
    pairs = [
        (start + place, token_id)
        for pair, start, length in zip(members, starts.tolist(), lengths, strict=True)
        for place in range(min(pair.sampling.min_tokens, length))
        for token_id in pair.banned_ids
    ]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
