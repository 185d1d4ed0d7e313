"""Hopper's kernels compile for sm_90 with the Triton that is installed, and fit the GPU's memory: no GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_CHILD = Path(__file__).with_name("compile_hopper_child.py")
# Bytes of shared memory that a program on sm_90 can have.
_SHARED_MEMORY = 227 * 1024


def require_compiler() -> None:
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper", reason="needs a Triton with Gluon")
    compiler = pytest.importorskip("triton.backends.nvidia.compiler", reason="needs Triton's NVIDIA backend")
    from triton import knobs

    try:
        assert compiler.get_ptxas(90).path and knobs.nvidia.cuobjdump.path
    except RuntimeError as reason:
        pytest.skip(f"needs the assembler and cuobjdump that come with Triton: {reason}")


def compile_all(cache: Path) -> dict[str, dict[str, object]]:
    """By case: {"kernels": {name: its resources, None where it was only lowered}} or {"error": ...}."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-P", _CHILD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_hopper_kernel_compiles_and_a_broken_one_is_found(tmp_path: Path) -> None:
    """One child for all: it is most of this test's time."""
    require_compiler()
    cases = compile_all(tmp_path)
    assert "CompilationError" in cases.pop("broken").get("error", "")
    errors = {name: case["error"] for name, case in cases.items() if "error" in case}
    assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())
    kernels = [kernel for case in cases.values() for kernel in case["kernels"].items()]
    assert {name for name, _ in kernels} == {
        "hopper_forward_kernel", "hopper_dq_kernel", "hopper_dkv_kernel", "row_terms_kernel", "hopper_linear_kernel",
        "attention_forward_kernel", "attention_decode_kernel",
    }  # fmt: skip
    for name, resources in kernels:
        if resources is not None:
            assert resources["shared"] <= _SHARED_MEMORY, name
            assert resources["stack"] == 0, f"{name}: registers have no room for all of it"
