"""Training batches as verl and TRL hold them: a line (or parquet row) is one sequence, or a whole padded batch.

verl: ``input_ids`` [P + R] padded left (prompt) and right (response), ``response_mask`` [R] of tokens that the loss
sees, ``rollout_log_probs`` [R], ``attention_mask`` [P + R]. TRL: ``prompt_ids`` [P] padded left, ``completion_ids`` [R]
padded right, ``sampling_per_token_logps`` [R], their masks ``prompt_mask`` and ``completion_mask``, ``tool_mask`` [R].

Padding is what the masks say. Without verl's response mask, its attention mask says which of ``responses`` [R] are
tokens, and all of them count. Without an attention mask it is the padding id at either end; that id is given, or in
verl's batches, where the response mask shows where responses end, seen from what fills the rest. Without either mask
all of ``responses`` count up to the padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlalign.verifier.dumps import fields
from rlalign.verifier.dumps.options import ReadOptions
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.dumps.rows import Row


def matches_verl(values: Mapping[str, Any]) -> bool:
    """True for a row with verl's log-probs, and its mask or its ids."""
    ids = "responses" in values and ("input_ids" in values or "prompts" in values)
    return "rollout_log_probs" in values and ("response_mask" in values or ids)


def matches_trl(values: Mapping[str, Any]) -> bool:
    """True for a row with TRL's ids and log-probs."""
    return all(name in values for name in ("completion_ids", "sampling_per_token_logps"))


def read_verl(row: Row, options: ReadOptions) -> Iterator[DumpSequence]:
    """One sequence per row of the batch; ``logprobs="old_log_probs"`` reads the trainer's side instead."""
    name = options.logprobs or "rollout_log_probs"
    optional = ("input_ids", "prompts", "attention_mask")
    pad = _pad_id(row, options)
    if row.values.get("response_mask") is not None:
        batch = _Batch(row, ("response_mask", name), (*optional, "responses"))
    else:
        if row.values.get("responses") is None:
            why = "and 'responses' too: one of them has to say where responses begin"
            raise row.error(f"field 'response_mask' is missing, {why}")
        if row.values.get("attention_mask") is None and pad is None:
            why = "and 'attention_mask' too: one of them, or the padding id, has to say where responses end"
            raise row.error(f"field 'response_mask' is missing, {why}")
        batch = _Batch(row, ("responses", name), optional)
    members = [batch.member(index) for index in range(batch.size)]
    if pad is None and not batch.has("attention_mask"):
        pad = _seen_padding(members)
    for member in members:
        yield _verl(member, name, pad)


def read_trl(row: Row, options: ReadOptions) -> Iterator[DumpSequence]:
    """One sequence per row of the batch; ``logprobs="old_per_token_logps"`` reads the trainer's side instead."""
    name = options.logprobs or "sampling_per_token_logps"
    batch = _Batch(row, ("prompt_ids", "completion_ids", name), ("prompt_mask", "completion_mask", "tool_mask"))
    pad = _pad_id(row, options)
    for ids, mask in (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask")):
        if batch.nested and pad is None and not batch.has(mask) and batch.rectangular(ids):
            raise row.error(
                f"field '{mask}' is missing: without it, or a padding id, the padding of '{ids}' is unknown"
            )
    for index in range(batch.size):
        yield _trl(batch.member(index), name, pad)


class _Member:
    """One sequence's fields; ``label`` is what an error calls one of them."""

    def __init__(self, row: Row, values: dict[str, Any], index: int | None) -> None:
        self.row, self.values, self.index = row, values, index

    def label(self, name: str) -> str:
        return name if self.index is None else f"{name}[{self.index}]"

    def ids(self, name: str) -> np.ndarray:
        return fields.ids(self.row, self.label(name), fields.need(self.row, name, self.values))

    def mask(self, name: str, length: int, other: str) -> np.ndarray:
        mask = fields.mask(self.row, self.label(name), self.values[name])
        fields.same_length(self.row, self.label(name), mask, other, length)
        return mask

    def sequence(self, **values: Any) -> DumpSequence:
        row = self.row
        name = None if self.index is not None else fields.text(row, "id", row.values.get("id"))
        source = row.source if self.index is None else f"{row.source}[{self.index}]"
        return DumpSequence(id=name or "", source=source, **fields.distribution(row), **values)


class _Batch:
    """The row's fields, seen as a batch: of one if they are flat lists."""

    def __init__(self, row: Row, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
        found = {name: fields.need(row, name) for name in required}
        found |= {name: row.values[name] for name in optional if row.values.get(name) is not None}
        for name, value in found.items():
            if not isinstance(value, list | np.ndarray):
                raise row.error(f"field '{name}' must be a list, is {value!r:.60}")
        first = found[required[0]]
        self.nested = len(first) > 0 and isinstance(first[0], list | np.ndarray)
        self.size = len(first) if self.nested else 1
        self._row, self._found = row, found
        if self.nested:
            for name, value in found.items():
                fields.same_length(row, name, value, required[0], self.size)

    def has(self, name: str) -> bool:
        return name in self._found

    def rectangular(self, name: str) -> bool:
        """Whether all rows are of one length, as padded ones are."""
        return len({len(value) for value in self._found[name]}) == 1

    def member(self, index: int) -> _Member:
        if not self.nested:
            return _Member(self._row, self._found, None)
        return _Member(self._row, {name: value[index] for name, value in self._found.items()}, index)


def _verl(member: _Member, name: str, pad: int | None) -> DumpSequence:
    ids, begin, mask = _verl_parts(member, pad)
    logprobs = fields.logprobs(member.row, member.label(name), member.values[name])
    # a full-length column is aligned with the ids: entry t is about token t
    logprobs = logprobs[begin:] if len(logprobs) == len(ids) else logprobs
    other = "response_mask" if "response_mask" in member.values else "responses"
    fields.same_length(member.row, member.label(name), logprobs, other, len(mask))
    if "attention_mask" in member.values:
        attention = member.mask("attention_mask", len(ids), "input_ids")
        start, end = _run(member, "attention_mask", attention, begin)
    else:
        start = _leading(member, ids[:begin], pad)
        end = begin + _last(mask)
    return member.sequence(
        prompt_token_ids=ids[start:begin],
        token_ids=ids[begin:end],
        logprobs=logprobs[: end - begin],
        mask=mask[: end - begin],
    )


def _verl_parts(member: _Member, pad: int | None) -> tuple[np.ndarray, int, np.ndarray]:
    """(all ids [P + R], where the response begins, its mask [R]). pad: not None where there is no mask."""
    if "input_ids" in member.values:
        ids = member.ids("input_ids")
    else:
        ids = np.concatenate([member.ids("prompts"), member.ids("responses")])
    if "response_mask" not in member.values:
        response = member.ids("responses")
        begin = len(ids) - len(response)
        if "attention_mask" not in member.values:
            return ids, begin, _unpadded(response, pad)
        return ids, begin, member.mask("attention_mask", len(ids), "input_ids")[begin:]
    mask = fields.mask(member.row, member.label("response_mask"), member.values["response_mask"])
    if len(mask) > len(ids):
        raise member.row.error(f"field '{member.label('response_mask')}' has {len(mask)} values for {len(ids)} ids")
    if len(mask) == len(ids):  # as long as the sequence: the response begins at the first token that the loss sees
        begin = int(np.argmax(mask)) if mask.any() else len(mask)
        return ids, begin, mask[begin:]
    return ids, len(ids) - len(mask), mask


def _run(member: _Member, name: str, attention: np.ndarray, begin: int) -> tuple[int, int]:
    """[start, end) of the real tokens around ``begin``, which must be one run."""
    if not attention.any():
        return begin, begin
    start, end = int(np.argmax(attention)), _last(attention)
    if not attention[start:end].all():
        hole = start + int(np.argmin(attention[start:end]))
        raise member.row.error(f"field '{member.label(name)}' has a hole at {hole}: padding stands at the ends only")
    return min(start, begin), max(end, begin)


def _trl(member: _Member, name: str, pad: int | None) -> DumpSequence:
    prompt, ids = member.ids("prompt_ids"), member.ids("completion_ids")
    logprobs = fields.logprobs(member.row, member.label(name), member.values[name])
    fields.same_length(member.row, member.label(name), logprobs, "completion_ids", len(ids))
    if "completion_mask" in member.values:
        mask = member.mask("completion_mask", len(ids), "completion_ids")
    else:
        mask = _unpadded(ids, pad)
    end = _last(mask)
    if "tool_mask" in member.values:
        mask = mask & member.mask("tool_mask", len(ids), "completion_ids")
    if "prompt_mask" in member.values:
        seen = member.mask("prompt_mask", len(prompt), "prompt_ids")
        start, _ = _run(member, "prompt_mask", seen, len(prompt))
    else:
        start = _leading(member, prompt, pad) if pad is not None else 0
    return member.sequence(
        prompt_token_ids=prompt[start:], token_ids=ids[:end], logprobs=logprobs[:end], mask=mask[:end]
    )


def _pad_id(row: Row, options: ReadOptions) -> int | None:
    meta = row.values.get("meta_info")
    in_meta = meta.get("pad_token_id") if isinstance(meta, dict) else None
    in_row = fields.whole(row, "pad_token_id", row.values.get("pad_token_id", in_meta))
    return in_row if options.pad_token_id is None else options.pad_token_id


def _seen_padding(members: list[_Member]) -> int | None:
    """The id that fills what follows the last token of every response; None if nothing does, or several ids do."""
    seen: set[int] = set()
    for member in members:
        ids, begin, mask = _verl_parts(member, None)
        if mask.any():
            seen |= set(np.unique(ids[begin + _last(mask) :]).tolist())
    return seen.pop() if len(seen) == 1 else None


def _leading(member: _Member, prompt: np.ndarray, pad: int | None) -> int:
    """How many padding ids the prompt begins with."""
    if pad is not None:
        return int(np.argmax(prompt != pad)) if (prompt != pad).any() else len(prompt)
    if len(prompt) > 1 and prompt[0] == prompt[1]:
        raise member.row.error(
            f"field 'attention_mask' is missing: the prompt begins with {prompt[0]} several times, which may be "
            "padding. Give attention_mask, or the padding id (--pad-token-id)"
        )
    return 0


def _unpadded(ids: np.ndarray, pad: int | None) -> np.ndarray:
    """True for all ids but the padding that they end with."""
    mask = np.ones(len(ids), np.bool_)
    if pad is not None:
        mask[_last(ids != pad) :] = False
    return mask


def _last(mask: np.ndarray) -> int:
    """One past the last True; 0 if there is none."""
    return len(mask) - int(np.argmax(mask[::-1])) if mask.any() else 0
