"""What a rollout actor refuses to load, before its first token."""

from __future__ import annotations

import pytest
import torch
from support.runs import tiny_run

from rlalign.actors.controller import gpu_share
from rlalign.actors.rollout_actor import RolloutActor
from rlalign.modeling import make_tiny_model
from rlalign.tasks.sort import make_sort_tokenizer


@pytest.mark.parametrize(
    ("num_pages", "limits", "needed"),
    [
        (15, {}, 16),  # the model's 64 positions
        (9, {"task": {"max_prompt_tokens": 32}}, 10),  # 32 + 8 tokens
        (5, {"engine": {"max_model_len": 24}}, 6),
    ],
)
def test_a_cache_that_would_refuse_a_request_is_refused(num_pages, limits, needed, tmp_path):
    def config(pages):
        engine = {"page_size": 4, "num_pages": pages, **limits.get("engine", {})}
        return tiny_run(tmp_path, **{**limits, "engine": engine})

    make_tiny_model(config(needed).model, make_sort_tokenizer(max_value=9), tmp_path / "model", seed=0)
    actor = RolloutActor(threads=torch.get_num_threads())
    with pytest.raises(ValueError, match=rf"num_pages={num_pages} with page_size=4 .* needs num_pages={needed}$"):
        actor.load(config(num_pages), tmp_path / "model")
    actor.load(config(needed), tmp_path / "model")


def test_all_actors_find_room_on_one_gpu():
    assert (gpu_share(2), gpu_share(3)) == (0.5, 0.3333)
    assert all(count * round(gpu_share(count) * 10_000) <= 10_000 for count in range(1, 100))
