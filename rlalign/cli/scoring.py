"""Log-probs of a dump's tokens by our policy, in every way that ``ScoreSettings`` name: the verifier's scorer.

Scoring sees token ids and sampling parameters; the log-probs that the dump reports are never looked at.
Legend: P prompt tokens, L response tokens, N response tokens of all sequences, H hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlalign.cli.contents import Content, contents
from rlalign.cli.forwards import check_feeds, forwards, make_feed
from rlalign.cli.heads import head_logprobs
from rlalign.cli.policies import Policies
from rlalign.config import SamplingParams
from rlalign.modeling import Policy, eos_ids
from rlalign.modeling.feeds import Feed
from rlalign.trainer.packing import banned_ids
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import TRANSFORMS, ScoreSettings, UnsupportedSetting, effective_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_KEPT_BYTES = 2**30
_HEAD_ONLY = ("processed", "ignore", *TRANSFORMS, "filters_first", "slack", "logits")


@dataclass(frozen=True, slots=True)
class _Hidden:
    """Hidden states [N, H] of the rows that the response's log-probs are read from, of these very sequences.

    rows: bool [N], False where a sequence has no such row.
    """

    sequences: tuple[DumpSequence, ...]
    values: Tensor
    targets: Tensor
    rows: np.ndarray


@dataclass(slots=True)
class PolicyScorer:
    """A ``verifier.score.Scorer`` over checkpoints. The last hidden states stay in memory, since many settings differ
    only in what is made of them.

    max_rows: of sequences beside each other in one forward.
    """

    policies: Policies
    tokenizer: PreTrainedTokenizerBase | None = None
    max_rows: int = 8192
    _hidden: OrderedDict[ScoreSettings, _Hidden] = field(default_factory=OrderedDict)

    @torch.no_grad()
    def __call__(self, sequences: Sequence[DumpSequence], settings: ScoreSettings) -> list[np.ndarray]:
        """Log-probs float32 [L] of every sequence, in order. Raises UnsupportedSetting, and ValueError naming the
        sequence for an id outside the vocabulary, an empty prompt, or more tokens than the model has positions."""
        lengths = [len(sequence.token_ids) for sequence in sequences]
        if not sum(lengths):
            return [np.zeros(0, np.float32) for _ in sequences]
        with self.policies.using(settings) as policy:
            hidden = self._hidden_of(policy, sequences, settings)
            values = self._logprobs(policy, hidden, sequences, settings)
        values[~hidden.rows] = np.nan
        return [part.copy() for part in np.split(values, np.cumsum(lengths)[:-1])]

    def _hidden_of(self, policy: Policy, sequences: Sequence[DumpSequence], settings: ScoreSettings) -> _Hidden:
        key = _forward_part(settings)
        kept = self._hidden.get(key)
        same = kept is not None and len(kept.sequences) == len(sequences)
        if not (same and all(a is b for a, b in zip(kept.sequences, sequences, strict=True))):
            kept = self._forward(policy, sequences, settings)
            room = _MAX_KEPT_BYTES - kept.values.nbytes
            if room >= 0:
                while sum(one.values.nbytes for one in self._hidden.values()) > room:
                    self._hidden.popitem(last=False)
                self._hidden[key] = kept
        if key in self._hidden:
            self._hidden.move_to_end(key)
        return kept

    def _forward(self, policy: Policy, sequences: Sequence[DumpSequence], settings: ScoreSettings) -> _Hidden:
        used = contents(sequences, settings, self.tokenizer, policy.model.config)
        feeds = _feeds(sequences, used, settings, _pad_id(self.tokenizer))
        check_feeds(policy, [feed for feed in feeds if feed is not None])
        wanted, exists = _wanted_rows(feeds, used, settings)
        place = np.full(sum(feed.num_rows for feed in feeds if feed is not None), -1)
        place[wanted[exists]] = np.flatnonzero(exists)
        values: Tensor | None = None
        with self._older(policy, settings) as older:
            for forward in forwards(policy, [feed for feed in feeds if feed is not None], settings, self.max_rows):
                if forward.older:
                    older.hidden(forward.token_ids, forward.position_ids, forward.context)
                    continue
                output = policy.hidden(forward.token_ids, forward.position_ids, forward.context)
                if values is None:
                    values = output.new_zeros(len(wanted), output.shape[1])
                taken = place[forward.rows]
                chosen = torch.from_numpy(np.flatnonzero(taken >= 0)).to(output.device)
                values[torch.from_numpy(taken[taken >= 0]).to(output.device)] = output[chosen]
        if values is None:
            raise RuntimeError("no forward ran although there are response tokens")
        targets = torch.from_numpy(np.concatenate([content.response for content in used])).to(policy.device)
        return _Hidden(tuple(sequences), values, targets, exists)

    @contextmanager
    def _older(self, policy: Policy, settings: ScoreSettings) -> Iterator[Policy]:
        """Whose keys and values sequences begin with, if not the policy's own."""
        if not settings.cached:
            yield policy
            return
        with self.policies.using(replace(settings, weights=settings.cached_by)) as older:
            if older.kv_layout != policy.kv_layout:
                raise UnsupportedSetting(f"weights={settings.cached_by}: its KV cache is not of the model's shape")
            yield older

    def _logprobs(
        self, policy: Policy, hidden: _Hidden, sequences: Sequence[DumpSequence], settings: ScoreSettings
    ) -> np.ndarray:
        params = [effective_sampling(sequence, settings) for sequence in sequences]
        each = [p for p, sequence in zip(params, sequences, strict=True) for _ in sequence.token_ids]
        bans = self._bans(policy, sequences, params)
        marked = np.array([bool(ids) for ids in bans], np.bool_)
        result = np.empty(len(each), np.float32)
        for group in (~marked, marked):
            index = np.flatnonzero(group)
            if len(index) == 0:
                continue
            at = torch.from_numpy(index).to(policy.device)
            mask = _mask([bans[i] for i in index], policy) if group is marked else None
            rows = None if all(_plain(each[i]) for i in index) else [each[i] for i in index]
            values = head_logprobs(policy, hidden.values[at], hidden.targets[at], settings, rows, mask)
            result[index] = values.cpu().numpy()
        return result

    def _bans(
        self, policy: Policy, sequences: Sequence[DumpSequence], params: Sequence[SamplingParams]
    ) -> list[tuple[int, ...]]:
        """Of every response token, the ids that it could not be."""
        found: list[tuple[int, ...]] = []
        for sequence, sampling in zip(sequences, params, strict=True):
            ids = banned_ids(sampling, eos_ids(self.tokenizer, policy.model), sequence.source)
            length = len(sequence.token_ids)
            found += [ids if place < sampling.min_tokens else () for place in range(length)]
        return found


def _forward_part(settings: ScoreSettings) -> ScoreSettings:
    """``settings`` without what only the output head sees."""
    plain = ScoreSettings()
    part = replace(settings, **{name: getattr(plain, name) for name in _HEAD_ONLY})
    return part if part.numerics == "native" else replace(part, native=part.native - {"head"})


def _feeds(
    sequences: Sequence[DumpSequence], used: Sequence[Content], settings: ScoreSettings, pad_id: int
) -> list[Feed | None]:
    """One feed per sequence, None for those without a response."""
    longest = settings.pad_to or max(len(content.prompt) for content in used)
    feeds: list[Feed | None] = []
    cached = settings.cached or [0] * len(sequences)
    for sequence, content, count in zip(sequences, used, cached, strict=True):
        if len(content.response) == 0:
            feeds.append(None)
            continue
        feed = make_feed(sequence, content.prompt, content.response, settings, longest_prompt=longest, pad_id=pad_id)
        # as many of the response, whatever prompt and padding are before it
        older = max(0, feed.prompt_length + count - len(sequence.prompt_token_ids)) if count else 0
        # a row of padding may be the one that a log-prob is read from
        feeds.append(replace(feed, canonical=np.ones(feed.num_rows, np.bool_), older=min(older, feed.num_rows)))
    return feeds


def _wanted_rows(
    feeds: Sequence[Feed | None], used: Sequence[Content], settings: ScoreSettings
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N], the row of all feeds that each token's log-prob is read from; bool [N], whether there is one."""
    parts, exist, start = [], [], 0
    for feed, content in zip(feeds, used, strict=True):
        if feed is None:
            continue
        rows = feed.prompt_length - 1 + np.arange(len(content.response)) + settings.target_shift
        parts.append(start + rows)
        exist.append((rows >= feed.older) & (rows < feed.num_rows))
        start += feed.num_rows
    return np.concatenate(parts), np.concatenate(exist)


def _pad_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The tokenizer's padding, or what serves as such where it has none: its end of sequence, or id 0."""
    for name in ("pad_token_id", "eos_token_id"):
        if isinstance(found := getattr(tokenizer, name, None), int):
            return found
    return 0


def _mask(bans: Sequence[tuple[int, ...]], policy: Policy) -> Tensor:
    mask = torch.zeros(len(bans), policy.vocab_size, dtype=torch.bool, device=policy.device)
    for row, ids in enumerate(bans):
        mask[row, list(ids)] = True
    return mask


def _plain(params: SamplingParams) -> bool:
    return params.temperature in (0.0, 1.0) and not params.truncated
