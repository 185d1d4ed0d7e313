"""``experiment=one_gpu`` on a CPU, with its sizes taken down: the same recipe, data and reward."""

from __future__ import annotations

import grpo
import pytest
from support.one_gpu import ROOT, one_gpu, questions
from support.runs import summary

from rlalign.dashboards.jsonl import read_metrics
from rlalign.tasks.byte_tokenizer import make_byte_tokenizer

TINY = (
    "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
    "model.intermediate_size=48", "model.max_position_embeddings=256", "model.vocab_size=512",
    "task.max_prompt_tokens=224", "sampling.max_tokens=12", "algorithm.group_size=4", "algorithm.prompts_per_step=2",
    "engine.num_pages=8", "engine.max_model_len=256", "eval.num_prompts=1", "cluster.device=cpu", "run.steps=2",
    "tracking=none", "trainer.lr=1e-3",
)  # fmt: skip


def test_it_is_what_it_says():
    config = one_gpu("task.path=train.jsonl")
    model = config.model
    assert (model.hidden_size, model.num_layers, model.num_heads, model.num_kv_heads) == (1024, 28, 16, 8)
    assert (model.head_dim, model.intermediate_size, model.vocab_size, model.dtype) == (128, 3072, 151936, "bfloat16")
    assert (model.path, model.warm_start_steps, config.run.steps, config.cluster.device) == (None, 0, 20, "cuda")
    assert config.engine.page_size >= 128 and config.cluster.num_rollout_actors == 1
    assert one_gpu("task.path=train.jsonl", "numerics=native").numerics == "native"


@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_its_steps_learn_and_agree(numerics, shared_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the reward's path is from there
    path = questions(tmp_path / "train.jsonl", 12)
    grpo.train(one_gpu(*TINY, f"numerics={numerics}", f"task.path={path}", f"run.dir={tmp_path / 'run'}"))
    found = summary(tmp_path / "run")
    assert found["status"] == "finished" and found["steps"] == 2
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in row]
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 and row["reward/std"] > 0 and row["weights_changed_frac"] > 0 for row in rows)
    if numerics == "invariant":
        assert found["mismatch_count"] == 0


def test_bytes_and_number_words_are_text(tmp_path):
    tokenizer = make_byte_tokenizer(300)
    assert len(tokenizer) == 300 and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (256, 257)
    text = "Ünïcode, 12 apples\n\n#### 7"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert max(tokenizer(text)["input_ids"]) < 256
    assert tokenizer.decode([258, 259, 299]) == " 0 1 41"
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.decode([299]) == " 41"
    with pytest.raises(ValueError, match="vocab_size=257"):
        make_byte_tokenizer(257)
