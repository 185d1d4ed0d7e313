"""One ``rlalign-verify dump``: reads, scores and counts, a file once or a folder for as long as it grows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rlalign.cli.dump_options import thresholds
from rlalign.cli.dump_output import Decode, LeftOut, Verdict
from rlalign.cli.dump_scoring import score_dump
from rlalign.cli.dump_watch import WatchedFolder
from rlalign.config import ScoringDtype
from rlalign.verifier.dumps import DumpSequence, Format, ReadOptions, detect_format, read_dump
from rlalign.verifier.dumps.distribution import Distribution
from rlalign.verifier.dumps.ids import Ids
from rlalign.verifier.dumps.signs import Signs, Zeros
from rlalign.verifier.stream.pieces import of_scores
from rlalign.verifier.stream.tally import Tally
from rlalign.verifier.words import counted

if TYPE_CHECKING:
    from rlalign.cli.dump_pictures import Pictures
    from rlalign.modeling import Policy

_NAMED = 1000


class Session:
    """What was found so far. The model is loaded when the first file with sequences is there.

    decode: token ids to text, once the model was loaded and if it has a tokenizer. Raises ValueError for arguments that
    can't be used.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.decode: Decode | None = None
        self._args = args
        self._bounds = thresholds(args)
        self._options = ReadOptions(args.logprobs, args.pad_token_id, args.prompt)
        self._pictures = _pictures() if args.html is not None else None
        self._tally = Tally(worst=args.worst, watch=None if self._pictures is None else self._pictures.add)
        self._policy: Policy | None = None
        self._dtype: ScoringDtype | None = None
        self._distributions: dict[str, Distribution] = {}
        self._ids, self._signs, self._zeros = Ids(within_files=True), Signs(), Zeros()
        self._failed: list[LeftOut] = []
        self._num_failed = 0
        self._unread: ValueError | None = None
        self._seconds = {"load": 0.0, "score": 0.0}

    def file(self) -> Verdict:
        """Score the whole file."""
        format = detect_format(self._args.file, self._args.format)
        sequences = read_dump(self._args.file, format=format.name, options=self._options)
        self._score(format, islice(sequences, self._args.limit))
        return self._verdict(str(self._args.file))

    def watch(self, console: Console) -> Verdict:
        """Score what the folder has and gains, a line for every change, until Ctrl-C, the time is up, or something
        can't be read."""
        folder = WatchedFolder(self._args.watch, self._args.format, self._options)
        self._model()
        end = None if self._args.watch_seconds is None else time.monotonic() + self._args.watch_seconds
        try:
            while True:
                for path, format, sequences in folder.look():
                    self._score(format, sequences)
                    console.print(f"{path}: {self._progress()}", markup=False, soft_wrap=True)
                pause = 1.0 if self._args.poll_seconds is None else self._args.poll_seconds
                left = pause if end is None else end - time.monotonic()
                if end is not None and left <= 0:
                    break
                time.sleep(min(pause, left))
        except KeyboardInterrupt:
            console.print("interrupted: this is what was found so far", markup=False)
        except ValueError as error:
            self._unread = error
        notes = [f"{path} is unfinished; its end was not compared" for path in folder.unfinished]
        return self._verdict(str(self._args.watch), notes)

    def _score(self, format: Format, sequences: Iterable[DumpSequence]) -> None:
        policy = self._model()
        distribution = self._distributions.setdefault(format.name, Distribution.of(vars(self._args), format))
        start = time.perf_counter()
        sequences = self._seen(sequences)
        for scored in score_dump(policy, sequences, distribution, micro_batch_tokens=self._args.micro_batch_tokens):
            if scored.train is not None:
                sides = of_scores(scored.sequence, scored.train)
                self._tally.add(sides)
                self._zeros.add(sides.rollout, sides.train, sides.keep)
                continue
            self._num_failed += 1
            if len(self._failed) < _NAMED:
                self._failed.append(LeftOut(scored.sequence.id, scored.sequence.name, scored.error))
        self._seconds["score"] = round(self._seconds["score"] + time.perf_counter() - start, 3)
        if self._unread is not None:
            raise self._unread

    def _seen(self, sequences: Iterable[DumpSequence]) -> Iterator[DumpSequence]:
        """The sequences up to one that can't be used; ``_unread`` is why, for when those before it were scored."""
        try:
            for sequence in sequences:
                self._ids.add(sequence)
                self._signs.add(sequence)
                yield sequence
        except ValueError as error:
            self._unread = error

    def _model(self) -> Policy:
        if self._policy is not None:
            return self._policy
        import torch
        from transformers.utils import logging as transformers_logging

        from rlalign.cli.policies import checkpoint_dtype
        from rlalign.modeling import load_policy, load_tokenizer

        args, start = self._args, time.perf_counter()
        transformers_logging.disable_progress_bar()
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device")
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        if not args.model.is_dir():
            raise FileNotFoundError(f"model folder {args.model} does not exist")
        self._dtype = args.dtype or checkpoint_dtype(args.model)
        self._policy = load_policy(
            args.model, dtype=self._dtype, numerics=args.numerics, device=args.device, without_dropout=True
        )
        try:
            # only to show tokens: the dump's own ids are checked as they are scored
            self.decode = load_tokenizer(args.model, extra_ids=True).decode
        except FileNotFoundError:
            self.decode = None  # tokens are then shown as ids
        self._seconds["load"] = round(time.perf_counter() - start, 3)
        return self._policy

    def _progress(self) -> str:
        outcome = self._tally.outcome()
        metrics = outcome.metrics
        return (
            f"{counted(outcome.num_sequences, 'sequence')}, {counted(outcome.num_tokens, 'token')}, "
            f"{outcome.mismatch_count:,} differ, "
            f"{outcome.nonfinite_count:,} missing or not finite, mean |Δ| {metrics['align/logp_abs_diff/mean']:.4g}, "
            f"max {metrics['align/logp_abs_diff/max']:.4g}"
        )

    def _verdict(self, dump: str, notes: Iterable[str] = ()) -> Verdict:
        args = self._args
        return Verdict(
            sides=(dump, f"{args.model} ({args.numerics}, {self._dtype})"),
            outcome=self._tally.outcome(),
            thresholds=self._bounds,
            facts=self._facts(),
            failed=tuple(self._failed),
            num_failed=self._num_failed,
            scored=True,
            notes=[
                *(note for each in self._distributions.values() for note in each.notes),
                *(note for note in (self._signs.note, self._zeros.note) if note),
                *notes,
            ],
            pictures=None if self._pictures is None else self._pictures.snapshot,
            unread=self._unread,
        )

    def _facts(self) -> dict[str, Any]:
        from rlalign_kernels import fingerprint

        policy = self._model()
        found = fingerprint(policy.backend, policy.device)
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self._args).items()}
        return {
            "model": str(self._args.model),
            "formats": sorted(self._distributions),
            "numerics": self._args.numerics,
            "dtype": self._dtype,
            "weights_sha256": policy.weights_hash(),
            "fingerprint": dict(found.fields) | {"sha256": found.sha256},
            "settings": {name: value for name, value in settings.items() if name not in ("run", "command")},
            "seconds": dict(self._seconds),
        }


def _pictures() -> Pictures:
    from rlalign.cli.dump_pictures import Pictures

    return Pictures()
