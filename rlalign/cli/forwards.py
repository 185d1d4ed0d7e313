"""The forwards that a set of sequences takes under ``ScoreSettings``.

One generator serves whoever runs them: the scorer, which wants log-probs, and the recorder, which wants every module's
output. The forwards themselves are those of rlalign/modeling/feeds.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlalign.modeling import Policy
from rlalign.modeling.feeds import Feed, Forward, canonical_rows, packed_forward, paged_forwards, row_groups
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import ScoreSettings

_PAGE = {"cuda": 128, "cpu": 16}


def make_feed(
    sequence: DumpSequence,
    prompt: np.ndarray,
    response: np.ndarray,
    settings: ScoreSettings,
    *,
    longest_prompt: int,
    pad_id: int,
) -> Feed:
    """Rows of one sequence. prompt, response: int64, maybe not the dump's own. Its last token is fed only if a
    log-prob is read from its row. Raises ValueError for an empty prompt."""
    if len(prompt) == 0:
        raise ValueError(f"{sequence.source}: the prompt is empty, nothing predicts the first response token")
    fed = response if settings.target_shift == 1 else response[:-1]
    pads = np.full(max(0, longest_prompt - len(prompt)) if settings.padding != "none" else 0, pad_id, np.int64)
    parts = [prompt, pads, fed] if settings.padding == "middle_seen" else [pads, prompt, fed]
    ids = np.concatenate(parts)
    real = [np.full(len(part), part is not pads) for part in parts]
    canonical = np.concatenate(real)
    positions = np.arange(len(ids))
    if settings.pad_position is not None:
        positions = np.where(canonical, np.cumsum(canonical) - 1, settings.pad_position)
    positions += settings.position_offset
    positions[len(pads) + len(prompt) :] += settings.response_position_offset
    return Feed(ids, positions, canonical, len(pads) + len(prompt), sequence.source or sequence.id)


def check_feeds(policy: Policy, feeds: Sequence[Feed]) -> None:
    """Raises ValueError naming the sequence for an id outside the vocabulary, and for more rows than positions."""
    for feed in feeds:
        bad = (feed.token_ids < 0) | (feed.token_ids >= policy.vocab_size)
        if bad.any():
            found = int(feed.token_ids[bad][0])
            raise ValueError(f"{feed.name}: token id {found} is outside the model's vocabulary of {policy.vocab_size}")
        if feed.num_rows > policy.max_positions:
            raise ValueError(f"{feed.name} needs {feed.num_rows} positions; the model has {policy.max_positions}")


def forwards(policy: Policy, feeds: Sequence[Feed], settings: ScoreSettings, max_rows: int) -> Iterator[Forward]:
    """Forwards over ``feeds``, which cover every row once. max_rows: of sequences beside each other; a longer
    sequence gets a forward, or a cache, of its own."""
    cached = settings.phase == "decode" or settings.chunk is not None or any(feed.older for feed in feeds)
    rows = canonical_rows(feeds)
    for group in row_groups(feeds, 0 if settings.batch == "alone" else max_rows):
        members = [(feeds[i], rows[i]) for i in group]
        if cached:
            pieces = [_pieces(feed, settings) for feed, _ in members]
            yield from paged_forwards(policy, members, pieces, page_size=_PAGE[policy.device.type])
        else:
            yield packed_forward(policy, members)


def _pieces(feed: Feed, settings: ScoreSettings) -> list[int]:
    """Bounds of what one sequence feeds at a time."""
    prefill = feed.prompt_length if settings.phase == "decode" else feed.num_rows
    chunk = settings.chunk or prefill
    return sorted({*range(0, prefill, chunk), *range(prefill, feed.num_rows), feed.older, feed.num_rows})
