from __future__ import annotations

import numpy as np
import pytest

from rlalign.records import Prompt
from rlalign.run import prompts_of_step


def prompts(count: int) -> list[Prompt]:
    return [Prompt(index, np.zeros(1, np.int64), "", "") for index in range(count)]


def ids(step: int, *, total: int = 10, count: int = 3, seed: int = 0) -> list[int]:
    return [p.prompt_id for p in prompts_of_step(prompts(total), step=step, count=count, seed=seed)]


def test_a_pass_shows_no_prompt_twice():
    seen = [i for step in (1, 2, 3) for i in ids(step)]
    assert len(seen) == len(set(seen)) == 9


def test_each_pass_and_each_seed_has_its_own_order():
    assert [ids(step) for step in (1, 2, 3)] != [ids(step) for step in (4, 5, 6)]
    assert ids(1, total=100) != ids(1, total=100, seed=1)


def test_a_step_is_a_function_of_seed_and_step():
    assert ids(5) == ids(5)
    assert all(ids(step) == sorted(set(ids(step))) for step in range(1, 20))


def test_more_prompts_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"takes 11 .*only 10"):
        ids(1, count=11)
    assert ids(1, count=10) == list(range(10))
