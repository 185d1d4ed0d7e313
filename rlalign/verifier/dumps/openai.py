"""OpenAI-style responses, completions and chat, of servers that also say which token ids they mean.

Ids are taken from ``token_ids`` of a choice (vLLM's ``return_token_ids``), or from tokens written as "token_id:123"
(``return_tokens_as_token_ids``). Those of the prompt stand in the choice, the response, or beside a recorded
``response``: ``prompt_token_ids``. Without them, those of a recorded ``request`` are the prompt, if it was sent as ids.
An echoed prompt serves too: its first log-prob is null. It ends where the request's ids do, or after
``usage.prompt_tokens``; where nobody says, after the first token.
A request of several prompts gets ``n`` choices for each: that of index i answers prompt i // n.
A response without ids is refused: encoding its text again need not give the ids that were sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rlalign.config import SamplingParams
from rlalign.verifier.dumps import fields, vllm
from rlalign.verifier.dumps.options import ReadOptions
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.dumps.rows import Row

_TOKEN_ID = "token_id:"


def matches(values: Mapping[str, Any]) -> bool:
    """True for a response with choices, or a record of one."""
    response = values.get("response")
    return isinstance((response if isinstance(response, dict) else values).get("choices"), list)


def read(row: Row, options: ReadOptions) -> Iterator[DumpSequence]:
    """One sequence per choice."""
    response = row.values["response"] if isinstance(row.values.get("response"), dict) else row.values
    choices = fields.objects(row, "choices", fields.need(row, "choices", response))
    name = fields.text(row, "id", response.get("id")) or ""
    for index, choice in enumerate(choices):
        own = name if len(choices) == 1 or not name else f"{name}/{choice.get('index', index)}"
        yield _Choice(row, response, index).sequence(own, options)


class _Choice:
    """One choice of a response, with where its errors are to point."""

    def __init__(self, row: Row, response: Mapping[str, Any], position: int) -> None:
        self.row, self.response, self.position = row, response, position
        self.choice, self.prefix = response["choices"][position], f"choices[{position}]."

    def sequence(self, name: str, options: ReadOptions) -> DumpSequence:
        in_prompt = self._prompt_logprobs()
        if options.prompt or (in_prompt is not None and self.choice.get("logprobs") is None):
            return self._of_prompt(name, in_prompt)
        tokens, logprobs = self._reported()
        prompt, token_ids, logprobs = self._prompt(self._token_ids(tokens), logprobs)
        fields.same_length(self.row, f"{self.prefix}logprobs", logprobs, "token_ids", len(token_ids))
        message = self.choice.get("message")
        text = message.get("content") if isinstance(message, dict) else self.choice.get("text")
        return DumpSequence(
            id=name,
            prompt_token_ids=prompt,
            token_ids=token_ids,
            logprobs=logprobs,
            **self._distribution(),
            weights_version=fields.whole(self.row, "weights_version", self.row.values.get("weights_version")),
            finish_reason=fields.text(self.row, f"{self.prefix}finish_reason", self.choice.get("finish_reason")),
            text=fields.text(self.row, f"{self.prefix}text", text),
            source=self.row.source,
        )

    def _reported(self) -> tuple[list[Any], np.ndarray]:
        """(tokens as written, log-probs) of a completions or a chat choice."""
        prefix = f"{self.prefix}logprobs"
        reported = fields.need(self.row, "logprobs", self.choice, self.prefix)
        if not isinstance(reported, dict):
            raise self.row.error(f"field '{prefix}' must be an object, is {reported!r:.60}")
        if isinstance(reported.get("content"), list):
            content = fields.objects(self.row, f"{prefix}.content", reported["content"])
            values = [
                fields.number(self.row, f"{prefix}.content[{i}].logprob", token.get("logprob"))
                for i, token in enumerate(content)
            ]
            return [token.get("token") for token in content], np.array(values, np.float32)
        listed = fields.need(self.row, "token_logprobs", reported, f"{prefix}.")
        return reported.get("tokens") or [], fields.logprobs(self.row, f"{prefix}.token_logprobs", listed)

    def _token_ids(self, tokens: list[Any]) -> np.ndarray:
        if self.choice.get("token_ids") is not None:
            return fields.ids(self.row, f"{self.prefix}token_ids", self.choice["token_ids"])
        written = [
            token[len(_TOKEN_ID) :] for token in tokens if isinstance(token, str) and token.startswith(_TOKEN_ID)
        ]
        if len(written) == len(tokens) and all(token.isdecimal() for token in written):
            return np.array([int(token) for token in written], np.int64)
        raise self.row.error(
            f"field '{self.prefix}token_ids' is missing: the response names no token ids. Ask the server for them "
            "(vLLM: return_token_ids=true or return_tokens_as_token_ids=true)"
        )

    def _prompt(self, token_ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt ids, token ids, log-probs), an echoed prompt split off."""
        found, echoed = self._prompt_ids(), self._echoed(logprobs)
        if found is None:
            found = self._recorded(token_ids, len(logprobs), echoed)
        if found is None and not echoed:
            raise self.row.error(
                "field 'prompt_token_ids' is missing: it belongs into the response or beside it (vLLM: "
                "return_token_ids=true), or, where the prompt was sent as ids, into 'request.prompt'; or ask for "
                "echo=true"
            )
        if found is None or (echoed and np.array_equal(token_ids, found)):  # nobody says where a response begins
            return token_ids[:1], token_ids[1:], logprobs[1:]
        if not echoed:
            return found, token_ids, logprobs
        if len(token_ids) == len(logprobs):  # not so where vLLM echoes: token_ids are then the response's alone
            if not np.array_equal(token_ids[: len(found)], found):
                raise self.row.error(f"field '{self.prefix}token_ids' echoes another prompt than 'prompt_token_ids'")
            token_ids = token_ids[len(found) :]
        return found, token_ids, logprobs[len(found) :]

    def _recorded(self, token_ids: np.ndarray, reported: int, echoed: bool) -> np.ndarray | None:
        """The prompt by the request, or of an echo by ``usage``; None where they say nothing, or something else."""
        asked = self._request_ids()
        if not echoed:  # an echo without its null: where it ends can't be told from a server that ignores the wish
            return None if self._request().get("echo") else asked
        if len(token_ids) != reported:  # the response's alone
            return asked
        if asked is not None and np.array_equal(token_ids[: len(asked)], asked):
            return asked
        usage = self.response.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        alone = len(self.response["choices"]) == 1 and self._num_prompts() == 1  # the count is of all prompts
        if alone and type(count) is int and 0 < count < len(token_ids):
            return token_ids[:count]
        return None

    def _echoed(self, logprobs: np.ndarray) -> bool:
        reported = self.choice["logprobs"].get("token_logprobs")
        return len(logprobs) > 0 and isinstance(reported, list) and reported[0] is None

    def _prompt_ids(self) -> np.ndarray | None:
        if self.choice.get("prompt_token_ids") is not None:
            return fields.ids(self.row, f"{self.prefix}prompt_token_ids", self.choice["prompt_token_ids"])
        for values in (self.response, self.row.values):
            if values.get("prompt_token_ids") is not None:
                return self._of_all("prompt_token_ids", values["prompt_token_ids"])
        return None

    def _of_all(self, name: str, listed: Any) -> np.ndarray:
        """This choice's prompt, of a field beside the choices: ids of the one prompt, or a list of them for each."""
        count = self._num_prompts()
        if count == 1:
            return fields.ids(self.row, name, listed)
        if not isinstance(listed, list) or len(listed) != count or not all(isinstance(one, list) for one in listed):
            raise self.row.error(
                f"field '{name}' must be {count} lists of ids, one for each of 'request.prompt', is {listed!r:.60}; "
                "or each choice has its own (vLLM: return_token_ids=true)"
            )
        place = self._place(count)
        return fields.ids(self.row, f"{name}[{place}]", listed[place])

    def _num_prompts(self) -> int:
        """Of the recorded request; 1 where none is."""
        prompt = self._request().get("prompt")
        return len(prompt) if isinstance(prompt, list) and any(isinstance(one, list | str) for one in prompt) else 1

    def _place(self, count: int) -> int:
        """Which of several prompts this choice answers: by its index, where those of all choices are there."""
        each = fields.whole(self.row, "request.n", self._request().get("n")) or 1
        choices = enumerate(self.response["choices"])
        indices = [fields.whole(self.row, f"choices[{i}].index", one.get("index", i)) for i, one in choices]
        if len(indices) != count * each or set(indices) != set(range(count * each)):
            raise self.row.error(
                f"field 'choices' has {len(indices)} choices whose 'index' is not each of 0 to {count * each - 1} once,"
                f" for {count} prompts in 'request.prompt' with n={each}: which answers which can't be told"
            )
        return indices[self.position] // each

    def _request(self) -> Mapping[str, Any]:
        request = self.row.values.get("request")
        return request if isinstance(request, dict) else {}

    def _request_ids(self) -> np.ndarray | None:
        """The ids that a recorded request sent as this choice's prompt; None for text."""
        request = self._request()
        if request.get("prompt_token_ids") is not None:
            return self._of_all("request.prompt_token_ids", request["prompt_token_ids"])
        prompt = request.get("prompt")
        if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], str):
            return None
        if len(prompt) == 1 and isinstance(prompt[0], list):
            prompt = prompt[0]
        return self._of_all("request.prompt", prompt)

    def _prompt_logprobs(self) -> Any:
        found = self.choice.get("prompt_logprobs")
        return self.response.get("prompt_logprobs") if found is None else found

    def _of_prompt(self, name: str, listed: Any) -> DumpSequence:
        if listed is None:
            raise self.row.error(f"field '{self.prefix}prompt_logprobs' is missing")
        prompt = self._prompt_ids()
        if prompt is None:
            raise self.row.error("field 'prompt_token_ids' is missing: whose log-probs 'prompt_logprobs' are")
        values = vllm.of_tokens(self.row, f"{self.prefix}prompt_logprobs", listed, prompt)
        return DumpSequence(name, prompt[:1], prompt[1:], values[1:], processed=False, source=self.row.source)

    def _distribution(self) -> dict[str, Any]:
        """As the recorded request says, where there is one; whether log-probs are processed is said beside it."""
        found = fields.distribution(self.row)
        if not isinstance(self.row.values.get("request"), dict):
            return found
        if found["sampling"] not in (None, SamplingParams()) or found["unmodelled"]:
            raise self.row.error("sampling parameters stand beside 'request', which has them: leave out one of the two")
        asked = Row(self.row.path, self.row.line, {"sampling": self._request()}, self.row.item)
        return fields.distribution(asked) | {"processed": found["processed"]}
