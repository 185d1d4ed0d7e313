"""Projections of the same rows as one product: q, k and v; gate and up. For an engine, which wants no gradient.

On the triton backend an output element is one chain over K, whatever other columns stand beside it, so the bits stay.
Parameters keep their names and shapes, and are read, written and saved as before: only their memory is now that of one
matrix. Modules stay as well: the first one of a group computes for all, the others take their part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from rlalign_kernels import Backend, linear
from torch import Tensor, nn

from rlalign.modeling.layers import AlignedLinear

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Bytes: where our products want a weight to begin.
_ALIGNMENT = 64


class FusedProjection:
    """Weight [N, K] and bias [N] of several linears, one after another, and the parts that were not fetched yet."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], backend: Backend) -> None:
        self.shape = tuple(weight.shape)
        self._weight, self._bias, self._sizes, self._backend = weight, bias, list(sizes), backend
        biases = [None] * len(self._sizes) if bias is None else bias.split(self._sizes)
        self._places = [*map(_places, weight.split(self._sizes), biases)]
        self._held: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def part(self, index: int, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor | None:
        """Output [..., N_index] for x [..., K]; None where ``weight`` or ``bias`` is no longer a part of ours.

        Computed for all members when the first one asks; the others must ask with the same tensor, unchanged.
        """
        if _places(weight, bias) != self._places[index]:
            return None
        version = 0 if x.is_inference() else x._version
        held = self._held
        if held is None or held[0] is not x or held[1] != version or index not in held[2]:
            out = linear(x, self._weight, self._bias, backend=self._backend)
            held = self._held = (x, version, dict(enumerate(out.split(self._sizes, -1))))
        found = held[2].pop(index)
        if not held[2]:
            self._held = None  # nothing keeps x any longer
        return found


def _places(weight: Tensor, bias: Tensor | None) -> tuple[int, int | None]:
    return weight.data_ptr(), None if bias is None else bias.data_ptr()


@torch.no_grad()
def fuse_projections(model: nn.Module, backend: Backend) -> list[tuple[int, int]]:
    """Fuse every group whose members are aligned linears beside each other; returns the shapes of all fused weights.

    What is fused already stays as it is. Tied or odd weights, adapters and other conventions are left alone.
    """
    uses = _uses(model)
    shapes = []
    for members in _groups(model):
        if members[0].rlalign_fused is None and _can_fuse(members, uses):
            _fuse(members, backend)
        if members[0].rlalign_fused is not None:
            shapes.append(members[0].rlalign_fused[0].shape)
    return shapes


def fused_shapes(model: nn.Module) -> set[tuple[int, int]]:
    """[N, K] of every product that a model's linears come to when they are fused, whether aligned or not."""
    uses = _uses(model)
    groups = [members for members in _groups(model, nn.Linear) if _can_fuse(members, uses)]
    return {(sum(m.weight.shape[0] for m in members), members[0].weight.shape[1]) for members in groups}


def _uses(model: nn.Module) -> Counter[int]:
    return Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)


def _groups(model: nn.Module, kind: type[nn.Module] = AlignedLinear) -> Iterator[list[nn.Module]]:
    for module in model.modules():
        for names in _GROUPS:
            members = [module._modules.get(name) for name in names]
            if all(isinstance(member, kind) for member in members):
                yield members


def _can_fuse(members: Sequence[nn.Module], uses: Counter[int]) -> bool:
    tensors = [p for m in members for p in m._parameters.values() if p is not None]
    first = members[0].weight
    alike = all(
        m._parameters.get("weight") is not None
        and (m.weight.shape[1], m.weight.dtype, m.weight.device) == (first.shape[1], first.dtype, first.device)
        and (m.bias is None) == (members[0].bias is None)
        and m.weight.nbytes % _ALIGNMENT == 0
        for m in members
    )
    return alike and all(uses[id(p)] == 1 for p in tensors)


def _fuse(members: Sequence[nn.Module], backend: Backend) -> None:
    sizes = [m.weight.shape[0] for m in members]
    weight = torch.cat([m.weight for m in members])
    bias = None if members[0].bias is None else torch.cat([m.bias for m in members])
    fused = FusedProjection(weight, bias, sizes, backend)
    biases = [None] * len(members) if bias is None else bias.split(sizes)
    for index, (member, its_weight, its_bias) in enumerate(zip(members, weight.split(sizes), biases, strict=True)):
        member.weight.data = its_weight
        if its_bias is not None:
            member.bias.data = its_bias
        member.rlalign_fused = (fused, index)
