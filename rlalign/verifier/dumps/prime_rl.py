"""prime-rl's token export (``token_exports/step_N/rank_R.jsonl``): one packed sequence a line, a value per token.

``token_ids``, ``loss_mask``, ``inference_logprobs`` and ``trainer_logprobs`` are aligned: entry t is about token t. The
response begins at the first token that the loss sees; null stands for what was not finite. Run, step, rank and
``export_sequence_idx`` name a sequence; without the last they would name many, and rows are then numbered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlalign.verifier.dumps import fields
from rlalign.verifier.dumps.options import ReadOptions
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.dumps.rows import Row

_IN_FILE = "export_sequence_idx"
_KEY = ("run_id", "export_step", "rank", _IN_FILE)


def matches(values: Mapping[str, Any]) -> bool:
    """True for a row with per-token ids, loss mask and inference log-probs."""
    return all(name in values for name in ("token_ids", "loss_mask", "inference_logprobs"))


def read(row: Row, options: ReadOptions) -> Iterator[DumpSequence]:
    """One sequence per row; ``logprobs="trainer_logprobs"`` reads the trainer's side instead."""
    name = options.logprobs or "inference_logprobs"
    token_ids = fields.ids(row, "token_ids", fields.need(row, "token_ids"))
    logprobs = fields.logprobs(row, name, fields.need(row, name))
    mask = fields.mask(row, "loss_mask", fields.need(row, "loss_mask"))
    for field, values in ((name, logprobs), ("loss_mask", mask)):
        fields.same_length(row, field, values, "token_ids", len(token_ids))
    begin = int(np.argmax(mask)) if mask.any() else len(mask)
    if begin == 0 and len(mask):
        begin = 1  # nothing predicts a sequence's first token, whatever the mask says of it
    parts = [str(row.values[key]) for key in _KEY if row.values.get(key) is not None]
    yield DumpSequence(
        id="" if row.values.get(_IN_FILE) is None else "/".join(parts),
        prompt_token_ids=token_ids[:begin],
        token_ids=token_ids[begin:],
        logprobs=logprobs[begin:],
        mask=mask[begin:],
        **fields.distribution(row),
        source=row.source,
    )
