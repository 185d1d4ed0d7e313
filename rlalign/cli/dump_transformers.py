"""``scripts/dump_transformers.py``: sample with transformers' own ``generate`` or ``generate_batch``, keep a dump.

Not a line of ours computes anything here: transformers loads the model, pads or batches, samples, and reports. The dump
is in our schema (docs/dumps.md), for ``rlalign-verify dump``, ``attribute`` and ``bisect``. Legend: B prompts of a
batch, L response tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rlalign.cli.dump_options import positive
from rlalign.cli.errors import EXIT_EQUAL, run_main
from rlalign.cli.parser import Parser
from rlalign.config import Dtype, SamplingParams
from rlalign.records import Prompt
from rlalign.verifier.dumps import DumpSequence, write_dump
from rlalign.verifier.dumps.native import check_dump_path

_ENGINES = ("generate", "generate_batch")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="dump_transformers.py",
        description="Sample with transformers' generate or generate_batch, and keep token ids and log-probs as a dump.",
        epilog="Exit codes: 0 written, 2 unusable input, 3 internal error.",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint folder")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="as rlalign-verify run takes them")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".jsonl or .parquet")
    parser.add_argument("--engine", choices=_ENGINES, default="generate", help="generate_batch: continuous batching")
    parser.add_argument("--raw", action="store_true", help="log-probs before all transforms (generate's output_logits)")
    parser.add_argument("--attention", default="sdpa", metavar="NAME", help="attn_implementation (default: sdpa)")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="default: the checkpoint's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts padded to one length")
    parser.add_argument("--limit", type=positive, metavar="N", help="take the first N prompts")
    parser.add_argument("--max-tokens", type=positive, default=64, metavar="N", help="of a response (default: 64)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0: off")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: off")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0: off; not with generate_batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the dump; ``argv`` None takes the process's own. Returns the exit code."""

    def run() -> int:
        args = make_parser().parse_args(argv)
        count = write_dump(args.out, sample(args))
        print(f"{args.out}: {count:,} sequences")
        return EXIT_EQUAL

    return run_main(run, traceback="--traceback" in argv if argv is not None else None)


def sample(args: argparse.Namespace) -> Iterator[DumpSequence]:
    """Every prompt's response. Raises ValueError for settings that the engine chosen can't report log-probs of."""
    import torch

    from rlalign.cli.policies import checkpoint_dtype
    from rlalign.cli.verify_prompts import encode_rows, needs_tokenizer, read_prompt_rows
    from rlalign.modeling import load_tokenizer

    check_dump_path(args.out)
    params = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, min_p=args.min_p, max_tokens=args.max_tokens
    )
    if args.engine == "generate_batch" and args.raw:
        raise ValueError("--raw: generate_batch reports log-probs after all transforms only; use --engine generate")
    if args.engine == "generate_batch" and args.min_p > 0:
        raise ValueError("--min-p: generate_batch has no such transform; use --engine generate")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    rows = read_prompt_rows(args.prompts, limit=args.limit)
    tokenizer = load_tokenizer(args.model) if needs_tokenizer(rows) else None
    prompts = encode_rows(rows, tokenizer)
    model = _load(args, args.dtype or checkpoint_dtype(args.model))
    torch.manual_seed(args.seed)
    run = _generate if args.engine == "generate" else _generate_batch
    for prompt, ids, logprobs in run(model, prompts, params, args):
        yield DumpSequence(
            id=str(prompt.prompt_id),
            prompt_token_ids=prompt.token_ids,
            token_ids=ids,
            logprobs=logprobs,
            sampling=params,
            processed=not args.raw,
            finish_reason="length" if len(ids) == args.max_tokens and ids[-1] not in _eos(model) else "stop",
            text=None if tokenizer is None else tokenizer.decode(ids),
        )


_Response = tuple[Prompt, np.ndarray, np.ndarray]


def _load(args: argparse.Namespace, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, dtype), attn_implementation=args.attention, local_files_only=True
    )
    return model.to(args.device).eval()


def _settings(model: Any, params: SamplingParams) -> Any:
    """Nothing of the checkpoint's own generation settings but its ends: what the dump names is what was done."""
    from transformers import GenerationConfig

    ends = _eos(model)
    # 50 is transformers' own default of top_k: 0 has to be said
    sampled = {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
    sampled |= {"min_p": params.min_p} if params.min_p > 0 else {}
    return GenerationConfig(
        do_sample=not params.greedy,
        max_new_tokens=params.max_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **({} if params.greedy else sampled),
    )


def _eos(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def _generate(model: Any, prompts: Sequence[Prompt], params: SamplingParams, args: Any) -> Iterator[_Response]:
    """``generate`` on left-padded batches, as most code calls it."""
    import torch

    settings, ends = _settings(model, params), _eos(model)
    settings.return_dict_in_generate, settings.output_scores, settings.output_logits = True, not args.raw, args.raw
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        longest = max(len(prompt.token_ids) for prompt in batch)
        ids = torch.full((len(batch), longest), settings.pad_token_id, device=model.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, longest - len(prompt.token_ids) :] = torch.from_numpy(prompt.token_ids)
            mask[row, longest - len(prompt.token_ids) :] = 1
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        logits = torch.stack(list(found.logits if args.raw else found.scores), dim=1).float()  # [B, L, V]
        tokens = found.sequences[:, longest:]
        logprobs = logits.log_softmax(-1).gather(2, tokens[:, : logits.shape[1], None])[..., 0].cpu().numpy()
        for row, prompt in enumerate(batch):
            length = _length(tokens[row].tolist(), ends)
            yield prompt, tokens[row, :length].cpu().numpy().astype(np.int64), logprobs[row, :length].copy()


def _length(tokens: Sequence[int], ends: Sequence[int]) -> int:
    """Response tokens before the padding that follows a sequence's end, the end included."""
    return next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))


def _generate_batch(model: Any, prompts: Sequence[Prompt], params: SamplingParams, args: Any) -> Iterator[_Response]:
    """``generate_batch``: transformers' continuous batching over a paged cache, all prompts at once."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    settings = _settings(model, params)
    if settings.eos_token_id is None:
        settings.eos_token_id = -1  # it wants a number; this one no token has
    tokens = sum(len(prompt.token_ids) + params.max_tokens for prompt in prompts)
    options: dict[str, Any] = {"return_logprobs": True}
    if args.device == "cpu":  # where it can't tell how much memory there is
        options |= {"num_blocks": -(-tokens // 256) + len(prompts) + 1, "max_batch_tokens": 256}
    if "seed" in ContinuousBatchingConfig.__dataclass_fields__:  # older ones draw from torch's generator
        options["seed"] = args.seed
    outputs = model.generate_batch(
        [prompt.token_ids.tolist() for prompt in prompts],
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(**options),
    )
    # request ids are numbered in the order of the prompts
    for prompt, output in zip(prompts, _in_order(outputs), strict=True):
        if output.error is not None or list(output.prompt_ids) != prompt.token_ids.tolist():
            reason = output.error or "it answers another prompt"
            raise RuntimeError(f"generate_batch failed on prompt {prompt.prompt_id}: {reason}")
        yield prompt, np.array(output.generated_tokens, np.int64), np.array(output.logprobs, np.float32)


def _in_order(outputs: dict[str, Any]) -> list[Any]:
    return [outputs[name] for name in sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))]


if __name__ == "__main__":
    sys.exit(main())
