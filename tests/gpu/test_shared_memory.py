"""Weights in GPU memory that another process reads, and a checksum that a GPU computes as a CPU does."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from support_qwen import DEVICE, random_qwen
from support_reader import read_in_another_process

from rlalign.actors.shared_memory import SharedBuffer
from rlalign.modeling import checksum_tensors


def test_a_checksum_is_the_same_on_both_devices():
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        tensors = {str(n): torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 7, 70_001)}
        tensors["large"] = torch.randn(5000, 7001).to(dtype)  # several pieces
        moved = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
        assert checksum_tensors(moved) == checksum_tensors(tensors)
        moved["large"].view(-1)[-1].view(torch.int16 if dtype != torch.float32 else torch.int32).bitwise_xor_(1)
        assert checksum_tensors(moved) != checksum_tensors(tensors)


@pytest.mark.timeout(300)
def test_another_process_reads_every_version():
    policy, buffer = random_qwen("0.6B", 2), SharedBuffer()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=read_in_another_process, args=(theirs,), daemon=True)
    child.start()
    try:
        for version in range(3):
            shared = buffer.publish(policy.named_weights(), version)
            expected = (shared.checksum, policy.weights_hash(), "cuda")
            for weight in policy.named_weights().values():
                weight.mul_(1.5)  # the reader has the version that was published
            ours.send(shared)
            assert ours.poll(200) and ours.recv() == expected
            assert buffer.sha256() == expected[1] != policy.weights_hash()
        ours.send(None)
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
