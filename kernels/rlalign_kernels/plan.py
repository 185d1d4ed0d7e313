"""Frozen reduction plans, and the fingerprint of everything that can change a bit.

The plan here is the reference backend's; ``gpu_plan.py`` names the triton backend's. A plan is a function of nothing
but such constants, the model's shapes and the GPU's architecture; no schedule is in it. On a CPU whose BLAS makes a
row's bits depend on its place among 16, products take the first of ``row_tiles`` that is free of that and whose bits
a tile of 128 rows or more keeps, or else the one kept by the tallest: a fact of CPU model and BLAS, which are fields
of the fingerprint for this reason.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from rlalign_kernels.dispatch import BACKENDS
from rlalign_kernels.gpu_plan import GpuPlan
from rlalign_kernels.norm import ONE_CHAIN
from rlalign_kernels.reference.attention import FLOOR
from rlalign_kernels.reference.attention_layout import KV_TILE
from rlalign_kernels.reference.elementwise import BLOCK, LANES, ZERO_EXP
from rlalign_kernels.reference.gemm import BASES, K_BLOCK, N_BLOCK
from rlalign_kernels.reference.vocab import VOCAB_BLOCK


@dataclass(frozen=True)
class LinearPlan:
    """K blocks ascending, each a float32 product from zero over a padded row tile; column blocks are absolute."""

    row_tiles: tuple[int, ...] = BASES
    k_block: int = K_BLOCK
    n_block: int = N_BLOCK


@dataclass(frozen=True)
class NormPlan:
    """Mean square as a product with constants; beyond ``one_chain`` channels, of 16 segments and then over those."""

    one_chain: int = ONE_CHAIN


@dataclass(frozen=True)
class AttentionPlan:
    """Online softmax over absolute key tiles, ascending, float32, from the finite maximum ``floor``.

    Row sums are one more column of the product with the values.
    """

    kv_tile: int = KV_TILE
    row_sums: str = "product"
    floor: float = FLOOR


@dataclass(frozen=True)
class VocabPlan:
    """Log-sum-exp over absolute vocabulary blocks, ascending; sums inside a block by a halving tree."""

    block: int = VOCAB_BLOCK


@dataclass(frozen=True)
class ElementwisePlan:
    """Transcendentals in padded flat blocks; weights of attention are 0 from ``zero_exp`` down."""

    block: int = BLOCK
    lanes: int = LANES
    zero_exp: float = ZERO_EXP


@dataclass(frozen=True)
class Plan:
    """Everything a reduction's bits follow from."""

    linear: LinearPlan = LinearPlan()
    norm: NormPlan = NormPlan()
    attention: AttentionPlan = AttentionPlan()
    vocab: VocabPlan = VocabPlan()
    elementwise: ElementwisePlan = ElementwisePlan()


@dataclass(frozen=True)
class Fingerprint:
    """What can change bits, field by field.

    Example:
        >>> Fingerprint({"torch": "2.13.0"}).difference(Fingerprint({"torch": "2.12.0"}))
        ['torch: 2.13.0 != 2.12.0']
    """

    fields: Mapping[str, str]

    @property
    def sha256(self) -> str:
        text = "\n".join(f"{name}={self.fields[name]}" for name in sorted(self.fields))
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, other: Fingerprint) -> list[str]:
        """``field: a != b`` for every field that differs, sorted; a missing one reads ``(absent)``."""
        names = sorted(set(self.fields) | set(other.fields))
        pairs = ((name, self.fields.get(name, "(absent)"), other.fields.get(name, "(absent)")) for name in names)
        return [f"{name}: {a} != {b}" for name, a, b in pairs if a != b]


def fingerprint(backend: str, device: torch.device | str) -> Fingerprint:
    """Of this process, for operators of ``backend`` on ``device``. Raises ValueError for an unknown backend.

    Imports no triton. Plan fields are those of the backend: the reference's for "native" too, which keeps to no plan.
    """
    if backend not in BACKENDS:
        raise ValueError(f"fingerprint: backend={backend!r} is unknown; supported: {list(BACKENDS)}")
    device = torch.device(device)
    fields = {"backend": backend, "device": device.type, "sources": _sources_sha256(), "torch": torch.__version__}
    fields["triton"] = version("triton")
    for name, plan in asdict(GpuPlan() if backend == "triton" else Plan()).items():
        fields[f"plan.{name}"] = ",".join(f"{key}={value}" for key, value in sorted(plan.items()))
    fields.update(_cpu_fields() if device.type == "cpu" else _gpu_fields(device))
    return Fingerprint(fields)


def _cpu_fields() -> dict[str, str]:
    config = torch.__config__.show()
    named = re.findall(r"(Math Kernel Library Version \S+|MKL-DNN v\S+|BLAS_INFO=\w+)", config)
    return {
        "cpu.model": cpu_model(),
        "cpu.capability": torch.backends.cpu.get_cpu_capability(),
        "cpu.blas": "; ".join(named) or "unknown",
        "cpu.mkl_cbwr": os.environ.get("MKL_CBWR", ""),
        "cpu.mkl_instructions": os.environ.get("MKL_ENABLE_INSTRUCTIONS", ""),
        "cpu.threads": str(torch.get_num_threads()),
    }


def cpu_model() -> str:
    """BLAS chooses its kernels by it, and so may the base row tile that the gemm probe finds free of position."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _gpu_fields(device: torch.device) -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(device)
    return {"gpu.architecture": f"sm_{major}{minor}", "cuda": str(torch.version.cuda)}


def version(package: str) -> str:
    """Of an installed package, or ``(none)``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(none)"


@cache
def _sources_sha256() -> str:
    """Of every Python file of this package, by relative path and content."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
