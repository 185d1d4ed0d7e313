"""Other tokens, prompts, rows and padding than the dump says, planted by plain transformers: each is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from support.models import tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlalign.cli.verify import main
from rlalign.verifier.dumps import DumpSequence, write_dump

LETTERS = "abcdefghij"
TEMPLATE = "<u>{{ messages[0]['content'] }}</u>{% if add_generation_prompt %}<a>{% endif %}"
LENGTHS = ((5, 14), (9, 11), (7, 16), (12, 13), (6, 12), (10, 15))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Letters, and ab and bc, so that a + bc is encoded again as ab + c."""
    words = ["<s>", "<u>", "</u>", "<a>", *LETTERS, "ab", "bc"]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("a", "b"), ("b", "c")]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(words[:4])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", chat_template=TEMPLATE)


TOKENIZER = make_tokenizer()
A, BC = TOKENIZER.convert_tokens_to_ids(["a", "bc"])
BOS, USER, END, ASSISTANT = range(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3")


def ids(length: int, random: Random) -> list[int]:
    """Of some text, which has a + bc in it."""
    letters = TOKENIZER.convert_tokens_to_ids([random.choice("defghij") for _ in range(length)])
    at = random.randrange(length - 1)
    return [*letters[:at], A, BC, *letters[at + 2 :]]


def again(tokens: list[int]) -> list[int]:
    return TOKENIZER(TOKENIZER.decode(tokens), add_special_tokens=False)["input_ids"]


@torch.no_grad()
def logprobs(
    model: PreTrainedModel, prompt: list[int], response: list[int], positions: list[int] | None = None, *, row: int = 0
) -> np.ndarray:
    """float32 [L], each from the row before its token, or ``row`` later. positions: the prompt's; None: from 0 on."""
    # one token more, for a row that is read too late
    ids = prompt + response + response[:1]
    before = list(range(len(prompt))) if positions is None else positions
    after = range(before[-1] + 1, before[-1] + 2 + len(response))
    output = model(torch.tensor([ids]), position_ids=torch.tensor([[*before, *after]]))
    values = torch.log_softmax(output.logits[0].float(), -1)
    first = len(prompt) - 1 + row
    rows = values[first : first + len(response)]
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


def middle(prompt: list[int]) -> list[int]:
    """With what fills it up to the longest prompt behind it."""
    return prompt + [0] * (max(n for n, _ in LENGTHS) - len(prompt))


def before(prompt: list[int]) -> list[int]:
    """What fills it up to the longest prompt of its batch of two."""
    lengths = [n for n, _ in LENGTHS]
    at = lengths.index(len(prompt)) // 2 * 2
    return [0] * (max(lengths[at : at + 2]) - len(prompt))


def uncounted(pads: int, prompt: list[int], response: list[int], position: int) -> tuple[list[int], ...]:
    """With padding before the prompt, all of it at one position."""
    return [0] * pads + prompt, response, [position] * pads + list(range(len(prompt)))


# cause: (prompt and response that were computed, maybe the prompt's positions; row)
Plant = Callable[[list[int], list[int]], tuple[list[int], ...]]
PLANTED: dict[str, tuple[Plant, int]] = {
    "prompt.with_bos": (lambda p, r: ([BOS, *p], r), 0),
    "prompt.without_first": (lambda p, r: (p[1:], r), 0),
    "prompt.without_last": (lambda p, r: (p[:-1], r), 0),
    "prompt.reencoded": (lambda p, r: (again(p), r), 0),
    "prompt.chat_template": (lambda p, r: ([USER, *again(p), END, ASSISTANT], r), 0),
    "prompt.generation_prompt": (lambda p, r: ([*p, ASSISTANT], r), 0),
    "tokenisation": (lambda p, r: (p, again(r)), 0),
    "target_shift[+1]": (lambda p, r: (p, r), 1),
    "target_shift[-1]": (lambda p, r: (p, r), -1),
    "padding.middle": (lambda p, r: (middle(p), r), 0),
    "padding.left.batches": (lambda p, r: ([*before(p), *p], r), 0),
    "padding.left.uncounted[0]": (lambda p, r: uncounted(len(middle(p)) - len(p), p, r, 0), 0),
    "padding.left.uncounted[1]": (lambda p, r: uncounted(len(middle(p)) - len(p), p, r, 1), 0),
    "padding.left.uncounted[1].batches": (lambda p, r: uncounted(len(before(p)), p, r, 1), 0),
}


def make_dump(model: PreTrainedModel, plant: Plant, row: int) -> list[DumpSequence]:
    random, made = Random(7), []
    for index, (prompt_length, length) in enumerate(LENGTHS):
        prompt, response = ids(prompt_length, random), ids(length, random)
        used = plant(prompt, response)
        assert len(used[1]) == len(response)
        values = logprobs(model, *used, row=row)
        made.append(DumpSequence(str(index), np.array(prompt), np.array(response), values, source=f"dump:{index}"))
    return made


def run(dump: list[DumpSequence], folder: Path, tmp_path: Path, *options: str) -> dict:
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    write_dump(file, dump)
    main(["attribute", "--dump", str(file), "--model", str(folder), "--json", str(out), "--no-decode", *options])
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("cause", "numerics"),
    [
        *((cause, "invariant") for cause in PLANTED),
        ("tokenisation", "native"),
        ("padding.middle", "native"),
        ("padding.left.uncounted[0]", "native"),
    ],
)
def test_what_was_computed_instead_is_named(cause, numerics, model, folder, tmp_path):
    found = run(make_dump(model, *PLANTED[cause]), folder, tmp_path, "--numerics", numerics)
    assert found["base"]["mean_abs"] > 1e-4
    assert [step["name"] for step in found["causes"] if step["kind"] != "numerics"] == [cause]
    assert found["rest"]["max_abs"] < 1e-5


@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_what_the_dump_says_is_no_cause(numerics, model, folder, tmp_path):
    found = run(make_dump(model, lambda p, r: (p, r), 0), folder, tmp_path, "--numerics", numerics)
    assert [step["name"] for step in found["causes"] if step["kind"] != "numerics"] == []
    assert found["findings"] == found["broken"] == []
