"""What engine tests share: tiny policies, random requests, packed scoring, poisoned caches."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import PackedContext, Policy, align, sampling_rows
from rlalign.records import Completion
from support.models import tiny_model

VOCAB = 97
MODEL_LIMIT = 256
EOS = 96


def tiny_policy(family: str = "qwen3", dtype: torch.dtype = torch.float32, backend: str = "reference") -> Policy:
    return Policy(align(tiny_model(family, dtype), backend=backend))


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, in the order of their codes; id 96 is the end of a sequence."""
    vocab = {chr(32 + index): index for index in range(95)} | {"<unk>": 95, "<eos>": EOS}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def random_prompts(seed: int, count: int, low: int = 1, high: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(low, high))] for _ in range(count)]


MIXED_SAMPLING = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
)


def mixed_params(seed: int, count: int, *, max_tokens: int = 20) -> list[SamplingParams]:
    """Every way of sampling, in turn, with random lengths and seeds."""
    rng = random.Random(seed)
    return [
        SamplingParams(
            **MIXED_SAMPLING[index % len(MIXED_SAMPLING)],
            max_tokens=rng.randint(1, max_tokens),
            seed=rng.randrange(2**64),
        )
        for index in range(count)
    ]


@torch.no_grad()
def packed_logprobs(
    policy: Policy, completions: Sequence[Completion], params: Sequence[SamplingParams], *, seed: int = 0
) -> list[np.ndarray]:
    """Float32 [L] of each completion as a trainer computes them: whole sequences, packed in a random order."""
    order = random.Random(seed).sample(range(len(completions)), len(completions))
    sequences = [np.concatenate([completions[i].prompt_ids, completions[i].token_ids]) for i in order]
    starts = np.cumsum([0, *map(len, sequences)])
    hidden = policy.hidden(
        torch.from_numpy(np.concatenate(sequences)),
        torch.from_numpy(np.concatenate([np.arange(len(s)) for s in sequences])),
        PackedContext(torch.from_numpy(starts.astype(np.int32))),
    )
    lengths = [len(completions[i].token_ids) for i in order]
    last = starts[1:] - 1  # the final token's own row predicts nothing that was drawn
    rows = np.concatenate([np.arange(end - length, end) for end, length in zip(last, lengths, strict=True)])
    output = policy.logprobs(
        hidden[torch.from_numpy(rows)],
        torch.from_numpy(np.concatenate([completions[i].token_ids for i in order])),
        sampling_rows([params[i] for i, length in zip(order, lengths, strict=True) for _ in range(length)]),
    )
    pieces = np.split(output.logprob.numpy(), np.cumsum(lengths)[:-1])
    return [piece for _, piece in sorted(zip(order, pieces, strict=True), key=lambda pair: pair[0])]


@torch.no_grad()
def packed_draws(policy: Policy, completion: Completion, params: SamplingParams, *, seed: int) -> list[int]:
    """The response drawn again, all positions at once, from one packed forward over the whole sequence."""
    length = len(completion.token_ids)
    sequence = torch.from_numpy(np.concatenate([completion.prompt_ids, completion.token_ids]))
    cu_seqlens = torch.tensor([0, len(sequence)], dtype=torch.int32)
    hidden = policy.hidden(sequence, torch.arange(len(sequence)), PackedContext(cu_seqlens))
    key = int(np.uint64(seed).view(np.int64))
    output = policy.sample(
        hidden[-length - 1 : -1],
        sampling_rows([params] * length),
        torch.full((length,), key, dtype=torch.int64),
        torch.arange(length),
    )
    return output.token.tolist()


def bits(values: np.ndarray) -> list[int]:
    """The 32 bits of each float32."""
    return values.astype(np.float32).view(np.int32).tolist()


def outcome(completions: Sequence[Completion]) -> list[tuple]:
    """What must be the same under every schedule: tokens, log-probs by their bits, and how each one ended."""
    return [(c.sample_index, c.token_ids.tolist(), bits(c.logprobs), c.finish_reason) for c in completions]


def flat(results: Sequence[Sequence[Completion]]) -> list[Completion]:
    return [completion for group in results for completion in group]


def poison(engine: Engine, value: float = float("nan")) -> int:
    """Overwrite every slot that no forward may read; returns how many there were."""
    pool, size = engine._pool, engine.config.page_size
    slots = [page * size + i for page in range(pool.num_pages) if pool.holds_nothing(page) for i in range(size)]
    held = {page for request in engine._scheduler.running for page in request.pages}
    filled: set[int] = set()
    for request in engine._scheduler.running:
        filled.update(_slots(request.pages, request.num_computed, size))
    slots += [page * size + i for page in held for i in range(size) if page * size + i not in filled]
    for cache in (*engine._runner.k_caches, *engine._runner.v_caches):
        cache.flatten(0, 1)[torch.tensor(slots, dtype=torch.long)] = value
    return len(slots)


def _slots(pages: list[int], num_computed: int, size: int) -> Iterator[int]:
    return (pages[position // size] * size + position % size for position in range(num_computed))


def run_poisoned(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], value: float
) -> list[Completion]:
    """``generate`` with every unused slot overwritten before every forward. One completion per prompt."""
    for number, (prompt, its_params) in enumerate(zip(prompts, params, strict=True)):
        engine.add(str(number), prompt, its_params)
    done: dict[int, Completion] = {}
    while engine.has_unfinished:
        assert poison(engine, value) > 0
        done.update({int(completion.request_id): completion for completion in engine.step()})
    return [done[number] for number in range(len(prompts))]


def scatter_free_pages(engine: Engine, seed: int) -> None:
    """Hand out pages in random order, so that page tables are permuted and fragmented."""
    pages = list(engine._pool._free)
    random.Random(seed).shuffle(pages)
    engine._pool._free.clear()
    engine._pool._free.update(dict.fromkeys(pages))


def roomy(**changes: object) -> EngineConfig:
    """A schedule with room for every test, and changes to it."""
    return EngineConfig(**{"page_size": 16, "num_pages": 400, **changes})
