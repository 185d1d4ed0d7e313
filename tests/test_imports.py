"""Which room may import which, and where ray, wandb, hydra and triton may be named at all. Read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SHARED = {"config", "records", "generators"}
# room: the rooms of ours that it may import, besides what all share
ALLOWED = {
    "modeling": set(),
    "algorithms": set(),
    "verifier": set(),
    "dashboards": set(),
    "tasks": set(),
    "engine": {"modeling"},
    "trainer": {"modeling", "algorithms"},
    "actors": {"engine", "trainer", "verifier", "modeling"},
    "run": {"dashboards", "verifier"},
}
WITH_KERNELS = {"modeling", "engine", "trainer", "actors"}
# the only places that may name a package, as path prefixes
ONLY_IN = {"ray": ("rlalign/actors/",), "wandb": ("rlalign/dashboards/",), "hydra": ("recipes/",)}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names and lines of all imports, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which room is meant"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def problems(path: Path) -> Iterator[str]:
    relative = path.relative_to(ROOT).as_posix()
    room = relative.split("/")[1].removesuffix(".py") if relative.startswith("rlalign/") else None
    for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
        package, _, rest = name.partition(".")
        other = rest.split(".")[0]
        where = f"{relative}:{line} imports {name}"
        if package in ONLY_IN and not relative.startswith(ONLY_IN[package]):
            yield where
        if relative.startswith("kernels/") and package == "rlalign":
            yield where
        if room in ALLOWED:
            if package == "rlalign" and other not in ALLOWED[room] | {room} | SHARED:
                yield where
            if package == "rlalign_kernels" and room not in WITH_KERNELS:
                yield where
        if room in SHARED and package in ("rlalign", "rlalign_kernels") and other != "config":
            yield where


@pytest.mark.parametrize("folder", ["kernels", "rlalign", "recipes"])
def test_every_import_goes_the_allowed_way(folder):
    files = sources(folder)
    assert files
    assert [problem for path in files for problem in problems(path)] == []


def test_every_room_has_a_rule():
    rooms = {path.parent.name for path in (ROOT / "rlalign").glob("*/__init__.py")}
    assert rooms - {"cli"} == set(ALLOWED)  # cli may import every room


def test_triton_is_only_imported_when_a_function_needs_it():
    """Kernels have files of their own, named after it or after the GPU; only those are allowed triton at the top, and
    nobody else imports them there."""
    for path in sources("kernels", "rlalign", "recipes"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [name for name, _ in imported(ast.Module([node], []))] if _is_import(node) else []
            at_top = [
                name for name in names if any(_is_kernel_file(part) or part == "triton" for part in name.split("."))
            ]
            assert not at_top or _is_kernel_file(path.stem), f"{path}: {at_top} at the top"


def _is_kernel_file(name: str) -> bool:
    return name.startswith(("triton_", "hopper_"))


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("rlalign/engine/x.py", "from rlalign.trainer import Trainer"),
        ("rlalign/trainer/x.py", "from rlalign.engine.engine import Engine"),
        ("rlalign/verifier/x.py", "import rlalign_kernels"),
        ("rlalign/tasks/x.py", "def f():\n    import wandb"),
        ("rlalign/run/x.py", "import ray"),
        ("rlalign/records.py", "from rlalign.modeling import Policy"),
        ("kernels/rlalign_kernels/x.py", "from rlalign.config import Config"),
    ],
)
def test_a_wrong_import_is_found(place, line, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    file.write_text(line)
    assert list(problems(file))


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)
