"""Weights through memory that processes share: what is published, read, checked and refused, and when it is used.

On a CPU a handle is a number and its memory is this process's; tests/gpu reads another process's.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.runs import tiny_run

from rlalign.actors import controller, shared_memory
from rlalign.actors.controller import Controller
from rlalign.actors.rollout_actor import RolloutActor
from rlalign.actors.shared_memory import SharedBuffer, SharedReader
from rlalign.actors.trainer_actor import TrainerActor
from rlalign.actors.weight_sync import bundle_weights
from rlalign.modeling import checksum_tensors, hash_tensors, make_tiny_model
from rlalign.tasks.sort import make_sort_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every buffer whose handle was made."""
    buffers: list[torch.Tensor] = []

    def export(buffer: torch.Tensor) -> tuple[int]:
        buffers.append(buffer)
        return (len(buffers) - 1,)

    monkeypatch.setattr(shared_memory, "export_memory", export)
    monkeypatch.setattr(shared_memory, "import_memory", lambda handle: buffers[handle[0]])
    return buffers


def some_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "b": torch.randn(7, generator=generator),
        "scalar": torch.tensor(float(seed)),
        "transposed": torch.randn(4, 6, generator=generator).T,
    }


def test_what_is_read_is_what_was_published(exported):
    buffer, reader = SharedBuffer(), SharedReader()
    for version in (1, 2):
        weights = some_weights(version)
        shared = buffer.publish(weights, version)
        found = reader.read(shared, CPU)
        assert list(found) == list(weights) and all(torch.equal(found[name], weights[name]) for name in weights)
        assert all(found[name].dtype == weights[name].dtype for name in weights)
        assert (shared.version, shared.checksum) == (version, checksum_tensors(weights)) and len(exported) == 1
        assert all(begin % 64 == 0 for _, _, begin in shared.layout.values())
        kept = hash_tensors(weights)
        weights["b"].add_(1)  # the trainer goes on
        assert checksum_tensors(reader.read(shared, CPU)) == shared.checksum and buffer.sha256() == kept
    other = buffer.publish({"b": torch.randn(7)}, 3)
    assert len(exported) == 2 and list(reader.read(other, CPU)) == ["b"]


def test_another_gpu_and_nothing_published_are_refused(exported, monkeypatch):
    with pytest.raises(RuntimeError, match=r"publish\(\) comes first"):
        SharedBuffer().sha256()
    shared = SharedBuffer().publish(some_weights(), 0)
    monkeypatch.setattr(shared_memory, "gpu_of", lambda _: "GPU-2")
    with pytest.raises(ValueError, match="in the memory of GPU none, this process is on GPU GPU-2"):
        SharedReader().read(shared, CPU)


@pytest.fixture
def actors(tmp_path):
    config = tiny_run(tmp_path)
    make_tiny_model(config.model, make_sort_tokenizer(max_value=9), tmp_path / "model", seed=0)
    trainer, rollout = (actor(threads=torch.get_num_threads()) for actor in (TrainerActor, RolloutActor))
    trainer.load(config, tmp_path / "model", 1)
    rollout.load(config, tmp_path / "model")
    return trainer, rollout


def test_actors_hand_over_and_check_both_ways(actors, exported):
    trainer, rollout = actors
    name, weight = next(iter(trainer.trainer.policy.named_weights().items()))
    weight.mul_(1.5)
    assert rollout.engine.weights_hash() != trainer.trainer.policy.weights_hash()
    shared, (version, checksum) = trainer.weights("cuda_ipc")
    assert rollout.load_weights(shared) == checksum == rollout.engine.weights_checksum() and version == 0
    sha256 = trainer.trainer.policy.weights_hash()
    assert rollout.engine.weights_hash() == sha256 == trainer.shared_sha256()
    bundle, (_, other) = trainer.weights("object_store")
    assert other == sha256 == rollout.load_weights(bundle)
    weight.mul_(2)
    bundle = bundle_weights(trainer.trainer.policy.named_weights(), 0, checksum="something else")
    with pytest.raises(ValueError, match="arrived damaged: their checksum is"):
        rollout.load_weights(bundle)
    weight.div_(2)
    good = bundle_weights(trainer.trainer.policy.named_weights(), 0, checksum=checksum)
    assert rollout.load_weights(good) == checksum
    exported[0][shared.layout[name][2]] ^= 1
    with pytest.raises(ValueError, match="version 0 arrived damaged: their checksum is"):
        rollout.load_weights(shared)
    assert rollout.engine.weights_hash() == sha256  # nothing was changed


def test_a_gpus_weights_have_a_sha256_for_who_asks(tmp_path, monkeypatch):
    weights, actors = some_weights(), Controller(tiny_run(tmp_path))
    assert actors.weights_sha256 is None
    actors._weights, actors._weights_digest = bundle_weights(weights, 1, checksum="of it"), "of it"
    assert actors.weights_sha256 == "of it"  # on a CPU it is the SHA-256
    monkeypatch.setattr(controller, "fetch", lambda reference: reference)
    actors.device = "cuda"
    assert actors.weights_sha256 == hash_tensors(weights)
    actors.weight_transport, actors.trainer = "cuda_ipc", SimpleNamespace(shared_sha256=lambda: "the trainer's")
    assert actors.weights_sha256 == "the trainer's"


def test_memory_is_tried_before_it_is_relied_on(actors, exported, monkeypatch):
    trainer, rollout = actors
    offered = trainer.offer_memory()
    assert rollout.try_memory(offered) is None
    exported[0][7] ^= 1
    assert rollout.try_memory(offered) == "what it reads there is not what the trainer wrote"

    def fail(*_):
        raise RuntimeError("CUDA error: invalid resource handle")

    monkeypatch.setattr(shared_memory, "import_memory", fail)
    assert "invalid resource handle" in rollout.try_memory(offered)
    trainer._trial = SharedBuffer()
    monkeypatch.setattr(shared_memory, "export_memory", fail)
    assert trainer.offer_memory().startswith("the trainer can't share its memory: CUDA error")


@pytest.mark.parametrize(
    ("setting", "device", "offer", "tried", "found"),
    [
        ("auto", "cuda", "memory", [None, None], "cuda_ipc"),
        ("cuda_ipc", "cuda", "memory", [None, None], "cuda_ipc"),
        ("object_store", "cuda", "memory", [None, None], "object_store"),
        ("auto", "cpu", "memory", [None, None], "object_store"),
        ("auto", "cuda", "memory", [None, "other GPU"], "object_store"),
        ("auto", "cuda", None, [None, None], "object_store"),
        ("cuda_ipc", "cuda", "memory", [None, "other GPU"], "rollout actor 1: other GPU; use auto or object_store"),
    ],
)
def test_the_fastest_way_that_works_is_taken(setting, device, offer, tried, found, tmp_path, monkeypatch, caplog):
    def remote(answer):
        return SimpleNamespace(try_memory=SimpleNamespace(remote=lambda offered: answer))

    actors = Controller(tiny_run(tmp_path))
    actors.config = tiny_run(tmp_path, cluster={"weight_transport": setting})
    actors.device, actors._rollouts = device, [remote(answer) for answer in tried]
    offered = "can't" if offer is None else SharedBuffer  # a string is why not
    actors.trainer = SimpleNamespace(offer_memory=lambda: offered)
    monkeypatch.setattr(controller, "fetch_named", lambda reference, _: reference)
    if "use auto" in found:
        with pytest.raises(ValueError, match=found):
            actors._choose_transport()
        return
    assert actors._choose_transport() == found
    fell_back = setting == "auto" and device == "cuda" and found == "object_store"
    assert ("weights go through host memory" in caplog.text) == fell_back


def test_shared_memory_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cluster\.weight_transport=cuda_ipc: the actors compute on device cpu"):
        Controller(tiny_run(tmp_path, cluster={"weight_transport": "cuda_ipc", "device": "cpu"}))
