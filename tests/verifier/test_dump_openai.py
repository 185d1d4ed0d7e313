"""OpenAI-style completions and chats, with and without an echoed prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.dumps import entry, ids, only, write

from rlalign.config import SamplingParams
from rlalign.verifier.dumps import detect_format, missing, read_dump


def test_openai_completion_with_returned_ids(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "ab", "finish_reason": "length", "prompt_token_ids": [1, 2], "token_ids": [7, 8],
              "logprobs": {"tokens": ["a", "b"], "token_logprobs": [-1.0, None], "text_offset": [0, 1],
                           "top_logprobs": [{"a": -1.0}, {"b": -2.0}]}}  # fmt: skip
    row = {"id": "cmpl-9", "object": "text_completion", "model": "m", "choices": [choice], "usage": {}}
    path = write(tmp_path, row)
    assert detect_format(path).name == "openai"
    sequence = only(path)
    assert (sequence.id, ids(sequence), sequence.text) == ("cmpl-9", ([1, 2], [7, 8]), "ab")
    assert missing(sequence.logprobs).tolist() == [False, True]


def test_openai_chat_with_tokens_as_ids_beside_its_request(tmp_path: Path) -> None:
    content = [{"token": "token_id:7", "logprob": -1.0, "bytes": [97], "top_logprobs": []},
               {"token": "token_id:8", "logprob": -9999.0, "bytes": None, "top_logprobs": []}]  # fmt: skip
    response = {"id": "chatcmpl-1", "object": "chat.completion", "prompt_token_ids": [4, 5], "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "ab"}, "finish_reason": "stop",
         "logprobs": {"content": content}}]}  # fmt: skip
    request = {"model": "m", "messages": [], "temperature": 0.5, "logprobs": True}
    sequence = only(write(tmp_path, {"request": request, "response": response}))
    assert (ids(sequence), sequence.text) == (([4, 5], [7, 8]), "ab")
    assert sequence.logprobs.tolist() == [-1.0, -9999.0]
    assert sequence.sampling == SamplingParams(temperature=0.5)
    for more in ({"sampling": {"temperature": 0.7}}, {"temperature": 0.7}, {"repetition_penalty": 1.2}):
        with pytest.raises(ValueError, match="sampling parameters stand beside 'request'"):
            only(write(tmp_path, {"request": request, "response": response, **more}))


def test_openai_echo(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "", "logprobs": {"tokens": [f"token_id:{i}" for i in (4, 5, 6)],
                                                    "token_logprobs": [None, -1.0, -2.0]}}  # fmt: skip
    sequence = only(write(tmp_path, {"id": "c", "choices": [choice]}))
    assert (ids(sequence), sequence.logprobs.tolist()) == (([4], [5, 6]), [-1.0, -2.0])
    echoed = only(write(tmp_path, {"id": "c", "choices": [{**choice, "prompt_token_ids": [4, 5]}]}))
    assert ids(echoed) == ([4, 5], [6])
    # vLLM's token_ids are the response's alone, whatever is echoed
    returned = {**choice, "prompt_token_ids": [4, 5], "token_ids": [6]}
    echoed = only(write(tmp_path, {"id": "c", "choices": [returned]}))
    assert (ids(echoed), echoed.logprobs.tolist()) == (([4, 5], [6]), [-2.0])
    scored = only(write(tmp_path, {"id": "c", "choices": [{**choice, "prompt_token_ids": [4, 5, 6]}]}))
    assert (ids(scored), scored.logprobs.tolist()) == (([4], [5, 6]), [-1.0, -2.0])


@pytest.mark.parametrize(("request_", "usage", "border"), [
    ({"prompt": [4, 5]}, {}, 2),
    ({"prompt": [[4, 5]]}, {"prompt_tokens": 3}, 2),
    ({"prompt_token_ids": [4, 5], "prompt": "ab"}, None, 2),
    ({"prompt": [5]}, {"prompt_tokens": 3}, 3),  # the server put a token before it
    ({"prompt": "ab"}, {"prompt_tokens": 2}, 2),
    ({}, {"prompt_tokens": 4}, 1),
    ({}, {"prompt_tokens": 0}, 1),
    ({}, {"prompt_tokens": True}, 1),
    ({"prompt": [4, 5, 6, 7]}, {}, 1),
])  # fmt: skip
def test_openai_echo_ends_where_the_request_or_the_usage_says(
    tmp_path: Path, request_: dict[str, Any], usage: dict[str, Any] | None, border: int
) -> None:
    tokens, values = [4, 5, 6, 7], [None, -1.0, -2.0, -3.0]
    choice = {"text": "", "logprobs": {"tokens": [f"token_id:{i}" for i in tokens], "token_logprobs": values}}
    sequence = only(write(tmp_path, {"request": request_, "response": {"choices": [choice], "usage": usage}}))
    assert (ids(sequence), sequence.logprobs.tolist()) == ((tokens[:border], tokens[border:]), values[border:])


def test_openai_usage_of_several_choices_is_no_border(tmp_path: Path) -> None:
    choice = {"text": "", "token_ids": [4, 5, 6], "logprobs": {"token_logprobs": [None, -1.0, -2.0]}}
    response = {"choices": [choice, choice], "usage": {"prompt_tokens": 2}}
    assert [ids(sequence) for sequence in read_dump(write(tmp_path, {"response": response}))] == [([4], [5, 6])] * 2


def test_openai_usage_of_several_prompts_is_no_border(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "", "token_ids": [4, 5, 6], "logprobs": {"token_logprobs": [None, -1.0, -2.0]}}
    response = {"choices": [choice], "usage": {"prompt_tokens": 2}}
    row = {"request": {"prompt": ["a", "b"], "echo": True}, "response": response}
    assert ids(only(write(tmp_path, row))) == ([4], [5, 6])


def test_openai_prompt_that_was_requested_as_ids(tmp_path: Path) -> None:
    choice = {"text": "", "token_ids": [6, 7], "logprobs": {"token_logprobs": [-1.0, -2.0]}}
    row = {"request": {"prompt": [4, 5]}, "response": {"choices": [choice]}}
    assert ids(only(write(tmp_path, row))) == ([4, 5], [6, 7])
    # token_ids of the response alone, beside log-probs of an echo
    listed = {"token_logprobs": [None, -0.5, -1.0, -2.0]}
    echoed = only(write(tmp_path, {**row, "response": {"choices": [{**choice, "logprobs": listed}]}}))
    assert (ids(echoed), echoed.logprobs.tolist()) == (([4, 5], [6, 7]), [-1.0, -2.0])
    own = only(write(tmp_path, {**row, "response": {"choices": [{**choice, "prompt_token_ids": [9]}]}}))
    assert ids(own) == ([9], [6, 7])


def several(request_: dict[str, Any], indices: list[int | None], **more: Any) -> dict[str, Any]:
    """A response whose choices are of token 100 + i, for the i-th index."""
    choices = [
        {"text": "", "token_ids": [100 + (i if index is None else index)], "logprobs": {"token_logprobs": [-1.0]}}
        | ({} if index is None else {"index": index})
        for i, index in enumerate(indices)
    ]
    return {"request": request_, "response": {"id": "c", "choices": choices}, **more}


PROMPTS = [[1], [2, 3], [4]]
TEXTS = {"prompt": ["a", "b", "c"]}


@pytest.mark.parametrize(
    ("row", "per_prompt"),
    [
        (several({"prompt": PROMPTS}, [2, 0, 1]), 1),
        (several({"prompt": PROMPTS}, [None, None, None]), 1),
        (several({"prompt": PROMPTS, "n": 2}, [0, 1, 2, 3, 4, 5]), 2),
        (several(TEXTS, [2, 1, 0], prompt_token_ids=PROMPTS), 1),
        (several({**TEXTS, "prompt_token_ids": PROMPTS, "n": 1}, [0, 1, 2]), 1),
    ],
)
def test_openai_each_choice_of_several_prompts_has_its_own(
    tmp_path: Path, row: dict[str, Any], per_prompt: int
) -> None:
    found = list(read_dump(write(tmp_path, row)))
    assert len(found) == per_prompt * len(PROMPTS)
    for sequence in found:
        prompt, [token] = ids(sequence)
        assert prompt == PROMPTS[(token - 100) // per_prompt]


def test_openai_echo_of_several_prompts(tmp_path: Path) -> None:
    choices = [{"index": 1 - i, "text": "", "token_ids": [*PROMPTS[1 - i], 7], "logprobs": {
        "token_logprobs": [None, *[-1.0] * len(PROMPTS[1 - i])]}} for i in range(2)]  # fmt: skip
    row = {"request": {"prompt": PROMPTS[:2], "echo": True}, "response": {"choices": choices}}
    assert [ids(sequence) for sequence in read_dump(write(tmp_path, row))] == [([2, 3], [7]), ([1], [7])]


@pytest.mark.parametrize(("row", "message"), [
    (several(TEXTS, [0, 1, 2], prompt_token_ids=[1]), "field 'prompt_token_ids' must be 3 lists of ids, one for each "
     "of 'request.prompt', is [1]; or each choice has its own"),
    (several({**TEXTS, "prompt_token_ids": [1]}, [0, 1, 2]), "field 'request.prompt_token_ids' must be 3 lists of ids"),
    (several(TEXTS, [0, 1, 2], prompt_token_ids=[[1], [2]]), "field 'prompt_token_ids' must be 3 lists of ids"),
    (several(TEXTS, [0, 1, 2]), "field 'prompt_token_ids' is missing"),
    # n=2 that nobody recorded; a choice that is not there; one twice
    (several({"prompt": PROMPTS}, [0, 1, 2, 3, 4, 5]), "'choices' has 6 choices whose 'index' is not each of 0 to 2"),
    (several({"prompt": PROMPTS}, [0]), "3 prompts in 'request.prompt' with n=1: which answers which can't be told"),
    (several({"prompt": PROMPTS}, [0, 1, 1]), "field 'choices' has 3 choices whose 'index' is not each of 0 to 2"),
    (several({"prompt": PROMPTS, "n": "2"}, [0, 1, 2]), "field 'request.n' must be a whole number, is '2'"),
    (several({"prompt": [[1], [2, -3]]}, [0, 1]), "field 'request.prompt[1][1]' must be a token id, is -3"),
    (several({"prompt": [[1], "b"]}, [0, 1]), "field 'request.prompt' must be 2 lists of ids"),
])  # fmt: skip
def test_openai_choices_whose_prompt_can_not_be_told_are_refused(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        list(read_dump(write(tmp_path, row)))
    assert "dump.jsonl, line 1: " in str(error.value)
    assert message in str(error.value)


def test_openai_choices_with_prompts_of_their_own_need_no_index(tmp_path: Path) -> None:
    row = several(TEXTS, [0])
    row["response"]["choices"][0]["prompt_token_ids"] = [9]
    assert ids(only(write(tmp_path, row))) == ([9], [100])


@pytest.mark.parametrize(("request_", "message"), [
    ({"prompt": "ab"}, "or, where the prompt was sent as ids, into 'request.prompt'"),
    ({"prompt": [4, 5], "echo": True}, "field 'prompt_token_ids' is missing"),
    ({"prompt": [4, -5]}, "field 'request.prompt[1]' must be a token id, is -5"),
])  # fmt: skip
def test_openai_requests_that_say_no_prompt(tmp_path: Path, request_: dict[str, Any], message: str) -> None:
    choice = {"text": "", "token_ids": [6], "logprobs": {"token_logprobs": [-1.0]}}
    with pytest.raises(ValueError) as error:
        only(write(tmp_path, {"request": request_, "response": {"choices": [choice]}}))
    assert message in str(error.value)


def test_openai_prompt_logprobs(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "x", "logprobs": None, "prompt_token_ids": [4, 5], "token_ids": [1],
              "prompt_logprobs": [None, entry(5, -3.0)]}  # fmt: skip
    assert ids(only(write(tmp_path, {"id": "c", "choices": [choice]}))) == ([4], [5])


@pytest.mark.parametrize(("change", "message"), [
    ({"token_ids": None}, "field 'choices[0].token_ids' is missing: the response names no token ids"),
    ({"prompt_token_ids": None}, "field 'prompt_token_ids' is missing"),
    ({"token_ids": [1, 2]}, "'choices[0].logprobs' has 1 values for 2 of 'token_ids'"),
    ({"logprobs": None}, "field 'choices[0].logprobs' is missing"),
])  # fmt: skip
def test_openai_errors(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    choice = {"index": 0, "text": "a", "token_ids": [7], "prompt_token_ids": [1],
              "logprobs": {"tokens": ["a"], "token_logprobs": [-1.0]}, **change}  # fmt: skip
    with pytest.raises(ValueError) as error:
        only(write(tmp_path, {"id": "c", "choices": [choice]}))
    assert message in str(error.value)
    assert "dump.jsonl, line 1" in str(error.value)
