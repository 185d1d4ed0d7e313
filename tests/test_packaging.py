"""What installing from a fresh clone relies on, and the style that ruff can check."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(_normal(line).split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+(?=.*==)", "-", name).lower()


def test_the_folder_kernels_is_no_package():
    # transformers imports a package named "kernels" wherever it finds one
    assert not list((ROOT / "kernels").glob("*.py"))
    assert (ROOT / "kernels" / "rlalign_kernels" / "__init__.py").is_file()


def test_every_requirement_is_pinned_within_its_bounds():
    pinned = pins()
    for requirement in requirements():
        if requirement.name != "triton":
            assert requirement.specifier.contains(pinned[_normal(f"{requirement.name}==")[:-2]]), requirement


def test_torch_is_pinned_and_triton_is_left_to_torch():
    assert pins()["torch"] == "2.13.0"
    assert "triton" not in pins() and not any(name.startswith("nvidia") for name in pins())
    triton = next(requirement for requirement in requirements() if requirement.name == "triton")
    assert str(triton.marker) == 'sys_platform == "linux"' and "3.6.0" in triton.specifier


def test_supported_versions():
    by_name = {requirement.name: requirement.specifier for requirement in requirements()}
    assert "2.11.0" in by_name["torch"] and "5.17.0" in by_name["transformers"]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize("name", ["rlalign", "kernels/rlalign_kernels"])
def test_types_are_shipped(name):
    assert (ROOT / name / "py.typed").is_file()


def test_the_console_script_exists():
    module, function = PROJECT["scripts"]["rlalign-verify"].split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_ci_runs_the_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[1:] == ["bash scripts/test.sh"]


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff_has_nothing_to_say(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "setup.sh"])
def test_scripts_are_valid_shell(script):
    assert subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)]).returncode == 0


def test_a_python_that_is_too_old_is_refused_with_the_remedy(tmp_path):
    done = subprocess.run(
        ["bash", "scripts/test.sh"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "RLALIGN_VENV": str(tmp_path / "venv"), "RLALIGN_PYTHON": "no-such-python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "apt-get install" in done.stderr
    assert not (tmp_path / "venv").exists()
