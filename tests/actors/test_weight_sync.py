from __future__ import annotations

import pickle

import pytest
import torch

from rlalign.actors.weight_sync import bundle_weights, unbundle_weights
from rlalign.modeling import hash_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_survive_the_journey_bit_for_bit(dtype):
    weights = {
        "b": torch.randn(3, 5, dtype=torch.float32).to(dtype),
        "a": torch.tensor([float("nan"), -0.0, float("inf")], dtype=dtype),
        "transposed": torch.randn(4, 6).to(dtype).T,
    }
    sha256 = hash_tensors(weights)
    bundle = pickle.loads(pickle.dumps(bundle_weights(weights, 7, sha256), protocol=5))
    arrived = unbundle_weights(bundle)
    assert (bundle.version, bundle.sha256, hash_tensors(arrived)) == (7, sha256, sha256)
    assert {name: (t.dtype, t.shape) for name, t in arrived.items()} == {
        name: (t.dtype, t.shape) for name, t in weights.items()
    }
