"""SGLang's ``/generate`` responses: ``meta_info.output_token_logprobs``, one [log-prob, token id, text] per token.

The prompt's ids come from the request, recorded beside the response (``input_ids``, ``prompt_token_ids``), or from
``meta_info.input_token_logprobs`` if it starts at the first token (``logprob_start_len=0``). SGLang divides by the
temperature before it takes log-probs, but does not renormalise after top-k, top-p and min-p.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlalign.verifier.dumps import fields
from rlalign.verifier.dumps.options import ReadOptions
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.dumps.rows import Row

_OUTPUT, _INPUT = "meta_info.output_token_logprobs", "meta_info.input_token_logprobs"
_PROMPT_FIELDS = ("prompt_token_ids", "input_ids", "prompt_ids")


def matches(values: Mapping[str, Any]) -> bool:
    """True for a response whose meta_info has per-token log-probs."""
    meta = values.get("meta_info")
    return isinstance(meta, dict) and ("output_token_logprobs" in meta or "input_token_logprobs" in meta)


def read(row: Row, options: ReadOptions) -> Iterator[DumpSequence]:
    """One sequence per response."""
    meta = fields.need(row, "meta_info")
    if not isinstance(meta, dict):
        raise row.error(f"field 'meta_info' must be an object, is {meta!r:.60}")
    reported, in_prompt = meta.get("output_token_logprobs"), meta.get("input_token_logprobs")
    if options.prompt or (not reported and in_prompt):
        values, token_ids = _entries(row, _INPUT, fields.need(row, "input_token_logprobs", meta, "meta_info."))
        prompt, token_ids, values = token_ids[:1], token_ids[1:], values[1:]
        said = {"processed": False}  # nothing was sampled
    else:
        values, token_ids = _entries(row, _OUTPUT, fields.need(row, "output_token_logprobs", meta, "meta_info."))
        prompt, said = _prompt(row, meta), fields.distribution(row)
    reason = meta.get("finish_reason")
    version = meta.get("weight_version")
    yield DumpSequence(
        id=fields.text(row, "meta_info.id", meta.get("id")) or "",
        prompt_token_ids=prompt,
        token_ids=token_ids,
        logprobs=values,
        **said,
        # SGLang's own name for weights that were never updated is "default"
        weights_version=int(version) if str(version).isdecimal() else None,
        finish_reason=reason.get("type") if isinstance(reason, dict) else fields.text(row, "finish_reason", reason),
        text=fields.text(row, "text", row.values.get("text")),
        source=row.source,
    )


def _prompt(row: Row, meta: Mapping[str, Any]) -> np.ndarray:
    for name in _PROMPT_FIELDS:
        if row.values.get(name) is not None:
            return fields.ids(row, name, row.values[name])
    listed, expected = meta.get("input_token_logprobs") or [], meta.get("prompt_tokens")
    if not listed or (expected is not None and len(listed) != expected):
        found = f"'{_INPUT}' has {len(listed)} of {expected if expected is not None else 'its'} tokens"
        raise row.error(
            f"field 'prompt_token_ids' is missing, and {found}: put the request's input_ids beside the response, "
            "or ask with logprob_start_len=0"
        )
    return _entries(row, _INPUT, listed)[1]


def _entries(row: Row, name: str, listed: Any) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs float32 [n], ids int64 [n]) of [log-prob, id, ...] entries."""
    if not isinstance(listed, list):
        raise row.error(f"field '{name}' must be a list, is {listed!r:.60}")
    for index, entry in enumerate(listed):
        if not isinstance(entry, list | tuple) or len(entry) < 2:
            raise row.error(f"field '{name}[{index}]' must be [log-prob, token id, ...], is {entry!r:.60}")
    return fields.logprobs(row, name, [entry[0] for entry in listed]), fields.ids(row, name, [e[1] for e in listed])
