"""vLLM's ``RequestOutput`` as JSON: nested (``outputs``), or flat with one completion's fields beside the request's.

``logprobs`` has one object per token, from token ids to {"logprob", "rank", ...}; the sampled id is among them. vLLM
reports raw log-probs by default (``logprobs_mode``). ``prompt_logprobs`` begins with null; it is read when there are no
response log-probs, or on demand: the tokens are then the prompt's own, all but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlalign.verifier.dumps import fields
from rlalign.verifier.dumps.options import ReadOptions
from rlalign.verifier.dumps.record import MISSING, DumpSequence
from rlalign.verifier.dumps.rows import Row


def matches(values: Mapping[str, Any]) -> bool:
    """True for a row with ids of a prompt, and nested completions, or one whose log-probs are objects."""
    if "prompt_token_ids" not in values:
        return False
    outputs = values.get("outputs")
    if isinstance(outputs, list) and any(isinstance(one, dict) and "token_ids" in one for one in outputs):
        return True
    completions = outputs if isinstance(outputs, list) else [values]
    listed = [completion.get("logprobs") for completion in completions if isinstance(completion, dict)]
    listed.append(values.get("prompt_logprobs"))
    return any(isinstance(item, dict) for items in listed if isinstance(items, list) for item in items)


def read(row: Row, options: ReadOptions) -> Iterator[DumpSequence]:
    """One sequence per completion."""
    prompt = fields.ids(row, "prompt_token_ids", fields.need(row, "prompt_token_ids"))
    name = fields.text(row, "request_id", row.values.get("request_id")) or ""
    outputs = row.values.get("outputs")
    if options.prompt or (row.values.get("prompt_logprobs") is not None and not _has_logprobs(row, outputs)):
        yield _of_prompt(row, name, prompt)
        return
    if outputs is None:
        yield _of_completion(row, row.values, "", name, prompt)
        return
    for index, completion in enumerate(fields.objects(row, "outputs", outputs)):
        own = name if len(outputs) == 1 or not name else f"{name}/{completion.get('index', index)}"
        yield _of_completion(row, completion, f"outputs[{index}].", own, prompt)


def _has_logprobs(row: Row, outputs: Any) -> bool:
    completions = [row.values] if outputs is None else fields.objects(row, "outputs", outputs)
    return any(completion.get("logprobs") for completion in completions)


def _of_completion(row: Row, completion: Mapping[str, Any], prefix: str, name: str, prompt: np.ndarray) -> DumpSequence:
    token_ids = fields.ids(row, f"{prefix}token_ids", fields.need(row, "token_ids", completion, prefix))
    if completion.get("logprobs") is None:
        raise row.error(f"field '{prefix}logprobs' is missing: ask vLLM for it, SamplingParams(logprobs=0)")
    return DumpSequence(
        id=name,
        prompt_token_ids=prompt,
        token_ids=token_ids,
        logprobs=of_tokens(row, f"{prefix}logprobs", completion["logprobs"], token_ids),
        **fields.distribution(row),
        weights_version=fields.whole(row, "weights_version", row.values.get("weights_version")),
        finish_reason=fields.text(row, f"{prefix}finish_reason", completion.get("finish_reason")),
        text=fields.text(row, f"{prefix}text", completion.get("text")),
        source=row.source,
    )


def _of_prompt(row: Row, name: str, prompt: np.ndarray) -> DumpSequence:
    listed = fields.need(row, "prompt_logprobs")
    fields.same_length(row, "prompt_logprobs", listed, "prompt_token_ids", len(prompt))
    return DumpSequence(
        id=name,
        prompt_token_ids=prompt[:1],
        token_ids=prompt[1:],
        logprobs=of_tokens(row, "prompt_logprobs", listed, prompt)[1:],
        processed=False,  # nothing was sampled
        source=row.source,
    )


def of_tokens(row: Row, name: str, listed: Any, token_ids: np.ndarray) -> np.ndarray:
    """float32 [L] of per-token objects {token id: log-prob}; MISSING where the token's own id is not among them."""
    if not isinstance(listed, list):
        raise row.error(f"field '{name}' must be a list of objects, is {listed!r:.60}")
    fields.same_length(row, name, listed, "token_ids", len(token_ids))
    result = np.full(len(listed), MISSING, np.float32)
    for index, (entries, token_id) in enumerate(zip(listed, token_ids.tolist(), strict=True)):
        if entries is None:
            continue
        if not isinstance(entries, dict):
            raise row.error(f"field '{name}[{index}]' must be an object of token ids, is {entries!r:.60}")
        entry = entries.get(str(token_id))
        value = entry.get("logprob") if isinstance(entry, dict) else entry
        result[index] = value if type(value) is float else fields.number(row, f"{name}[{index}].{token_id}", value)
    return result
