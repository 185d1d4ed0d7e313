"""What ``rlalign-verify replay`` does: both sides of a kept step once more, against what they gave then.

Legend: L response tokens of one sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_UNUSABLE, one_line
from rlalign.config import Config, SamplingParams, config_from_dict
from rlalign.dashboards.pictures import PictureData
from rlalign.records import Completion, Prompt, Sample
from rlalign.run.mismatch import FORMAT
from rlalign.run.pictures import picture_data
from rlalign.verifier.compare import Comparison, LogprobPair, compare
from rlalign.verifier.dumps import DumpSequence, read_dump
from rlalign.verifier.report import Report, build_report, record

if TYPE_CHECKING:
    from rlalign.modeling import Policy


_WEIGHTS = ("path", "sha256", "synced_sha256")


@dataclass(frozen=True, slots=True)
class Step:
    """A kept step. train: float32 [L] per sample, in the samples' order. weights: path, sha256 and synced_sha256."""

    path: Path
    then: str
    config: Config
    weights: dict[str, str] | None
    plan: dict[str, str]
    samples: tuple[Sample, ...]
    train: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class Replay:
    """then: the verdict of the run. recorded: rollout against trainer as they were; rollout, train: each side then
    against now, over the samples whose tokens are the same; now: both sides as they are now. weights_differ: the
    trainer held other weights than the engines were given."""

    path: Path
    then: str
    recorded: Comparison
    rollout: Comparison
    train: Comparison
    now: Comparison
    other_tokens: int
    weights_differ: bool
    remarks: tuple[str, ...]
    report: Report
    pictures: PictureData

    def comparisons(self) -> Iterator[tuple[str, Comparison]]:
        yield "rollout against trainer, then", self.recorded
        yield "rollout, then against now", self.rollout
        yield "trainer, then against now", self.train
        yield "rollout against trainer, now", self.now

    @property
    def exit_code(self) -> int:
        if self.now.num_tokens == 0:
            return EXIT_UNUSABLE
        return EXIT_EQUAL if self.now.equal else EXIT_DIFFERENT

    @property
    def verdict(self) -> str:
        """One line: is the mismatch there again, and which side gives what it gave."""
        same_rollout = self.rollout.equal and self.other_tokens == 0
        now = "they agree bit for bit now" if self.now.equal else f"{self.now.mismatch_count:,} tokens differ now"
        if self.now.num_tokens == 0:
            now = "now nothing was compared: no sample has the same tokens"
        if self.weights_differ:
            return f"the trainer's weights were not those that the engines were given; from the same weights, {now}"
        if same_rollout and self.train.equal:
            return f"reproduced: both sides give what they gave, {now}"
        if same_rollout:
            return f"the trainer's log-probs can't be reproduced, the rollout's can: the fault was the trainer's; {now}"
        if self.train.equal:
            return f"the rollout's log-probs can't be reproduced, the trainer's can: the fault was the rollout's; {now}"
        return f"neither side gives what it gave: its bits depend on the batch, the machine or other weights; {now}"

    def content(self) -> dict[str, Any]:
        """JSON's own types."""
        return {
            "exit_code": self.exit_code,
            "verdict": self.verdict,
            "then": self.then,
            "comparisons": {
                name: {
                    "num_tokens": one.num_tokens,
                    "mismatch_count": one.mismatch_count,
                    "nonfinite_count": one.nonfinite_count,
                    "max_abs_delta": one.max_abs_delta,
                }
                for name, one in self.comparisons()
            },
            "samples_with_other_tokens": self.other_tokens,
            "remarks": list(self.remarks),
            "worst_tokens": [record(token) for token in self.report.worst],
        }


def read_step(path: Path) -> Step:
    """A kept step, from its replay.json or its folder. FileNotFoundError, or ValueError naming file and field."""
    path = path / "replay.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"field 'format' is {content['format']!r}; this version reads {FORMAT}")
        rollout, train = (list(read_dump(path.with_name(f"{side}.jsonl"))) for side in ("rollout", "train"))
        if not len(content["samples"]) == len(rollout) == len(train):
            raise ValueError(f"{len(content['samples'])} samples, but {len(rollout)} and {len(train)} sequences")
        for a, b in zip(rollout, train, strict=True):
            _check_same_tokens(a, b)
        weights = content["weights"]
        return Step(
            path=path,
            then=content["verdict"],
            config=config_from_dict(content["config"]),
            weights=None if weights is None else {name: str(weights[name]) for name in _WEIGHTS},
            plan={str(name): str(value) for name, value in dict(content["plan"]).items()},
            samples=tuple(_sample(one, it) for one, it in zip(content["samples"], rollout, strict=True)),
            train=tuple(sequence.logprobs for sequence in train),
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a step that a run kept: {what}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def replay(step: Step, *, model: Path | None, device: str | None, worst: int) -> Replay:
    """Compute both sides once more. Raises ValueError where weights or device are missing."""
    from rlalign.actors.process import policy_settings, set_up
    from rlalign.cli.rescoring import rescore
    from rlalign.modeling import load_policy, load_tokenizer

    config = (
        step.config if device is None else replace(step.config, cluster=replace(step.config.cluster, device=device))
    )
    set_up(config.cluster.threads)
    folder = _weights_folder(step, model)
    policy = load_policy(folder, **policy_settings(config))
    remarks = _remarks(step, config, policy.weights_hash(), model)
    tokenizer = load_tokenizer(folder)
    train = rescore(policy, step.samples, micro_batch_tokens=config.trainer.micro_batch_tokens)
    rollout = _generate(policy, tokenizer, step.samples, config)
    same = [
        i for i, sample in enumerate(step.samples) if np.array_equal(rollout[i].token_ids, sample.completion.token_ids)
    ]
    if others := len(step.samples) - len(same):
        remarks.append(
            f"{others} of {len(step.samples)} samples have other tokens now; they are left out of what follows"
        )
    then = [sample.completion.logprobs for sample in step.samples]
    recorded = compare([_pair(a, b) for a, b in zip(then, step.train, strict=True)])
    if recorded.equal:
        remarks.append(f"all sampled tokens agreed then; what differed is beyond them and not replayed: {step.then}")
    report = build_report(recorded, step.samples, worst_tokens=worst, decode=tokenizer.decode)
    return Replay(
        path=step.path,
        then=step.then,
        recorded=recorded,
        rollout=compare([_pair(then[i], rollout[i].logprobs) for i in same]),
        train=compare([_pair(a, b) for a, b in zip(step.train, train, strict=True)]),
        now=compare([_pair(rollout[i].logprobs, train[i]) for i in same]),
        other_tokens=others,
        weights_differ=step.weights is not None and step.weights["synced_sha256"] != step.weights["sha256"],
        remarks=tuple(remarks),
        report=report,
        pictures=picture_data(recorded, report, step.samples, decode=tokenizer.decode),
    )


def _generate(policy: Policy, tokenizer: Any, samples: Sequence[Sample], config: Config) -> list[Completion]:
    """Every sample again, from its prompt and seed; in the samples' order."""
    from rlalign.engine import Engine

    by_prompt = {sample.prompt.prompt_id: sample for sample in samples}
    engine = Engine(policy, tokenizer, config.engine)
    groups = engine.generate(
        [one.prompt.token_ids.tolist() for one in by_prompt.values()], [one.sampling for one in by_prompt.values()]
    )
    found = {
        (prompt_id, completion.sample_index): completion
        for prompt_id, group in zip(by_prompt, groups, strict=True)
        for completion in group
    }
    return [found[sample.key[1], sample.key[2]] for sample in samples]


def _weights_folder(step: Step, model: Path | None) -> Path:
    if model is not None:
        return model
    if step.weights is None:
        raise ValueError(f"{step.path}: no weights were kept with this step; give those that sampled with --model DIR")
    folder = step.path.with_name(step.weights["path"])
    if not folder.is_dir():
        raise ValueError(f"{step.path}: its weights, {folder}, are not there; give those that sampled with --model DIR")
    return folder


def _remarks(step: Step, config: Config, sha256: str, model: Path | None) -> list[str]:
    """What isn't as it was: weights, and whatever else can change a bit."""
    from rlalign_kernels import Fingerprint

    from rlalign.actors.process import plan_of

    lines = []
    if step.weights is not None and sha256 != step.weights["sha256"]:
        which = "--model" if model is not None else "weights/"
        lines.append(f"{which} are other weights than the trainer's: SHA-256 {sha256}, then {step.weights['sha256']}")
    differences = Fingerprint(step.plan).difference(plan_of(config)) if step.plan else ["it was not recorded"]
    if differences:
        lines.append(f"the plan is not that of the run: {'; '.join(differences)}")
    return lines


def _check_same_tokens(a: DumpSequence, b: DumpSequence) -> None:
    same = a.id == b.id and np.array_equal(a.prompt_token_ids, b.prompt_token_ids)
    if not (same and np.array_equal(a.token_ids, b.token_ids)):
        raise ValueError(f"{a.source} (id {a.id!r}) and {b.source} (id {b.id!r}) are not the same sequence")


def _pair(rollout: np.ndarray, train: np.ndarray) -> LogprobPair:
    return LogprobPair(rollout=rollout, train=train, num_tokens=max(len(rollout), len(train)))


def _sample(request: dict[str, Any], sequence: DumpSequence) -> Sample:
    if request["id"] != sequence.id:
        raise ValueError(f"{sequence.source}: field 'id' is {sequence.id!r}, replay.json has {request['id']!r} there")
    key = "/".join(str(request[name]) for name in ("step", "prompt_id", "sample"))
    sampling = SamplingParams(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in request["sampling"].items()}
    )
    if key != sequence.id or request["sample"] >= sampling.n:
        raise ValueError(f"sample {sequence.id!r} is not sample {request['sample']} of {sampling.n} of {key!r}")
    prompt = Prompt(request["prompt_id"], sequence.prompt_token_ids, text="", ground_truth="")
    completion = Completion(
        request_id=sequence.id,
        sample_index=request["sample"],
        prompt_ids=sequence.prompt_token_ids,
        token_ids=sequence.token_ids,
        logprobs=sequence.logprobs,
        raw_logprobs=None,
        batch_sizes=np.array(request["batch_sizes"], np.int32),
        seed=request["seed"],
        weights_version=request["weights_version"],
        finish_reason=request["finish_reason"],
        text=sequence.text,
    )
    return Sample(request["step"], prompt, completion, sampling)
