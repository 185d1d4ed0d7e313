"""Tables of measured schedules: what is refused when one is read, and that only a named one is used."""

from __future__ import annotations

import json

import pytest
import torch
from rlalign_kernels import CONFORMANCE, linear, tuned
from rlalign_kernels.gemm.schedules import HOPPER_TILES, Layer, Tile, fitted
from rlalign_kernels.gemm.space import candidates, known_tiles
from rlalign_kernels.tuned import HeadEntry, LinearEntry
from rlalign_kernels.vocab.schedules import HeadTile
from support_kernels import interpreted, normal, same_bits

HOPPER = (9, 0)
LINEAR = LinearEntry(48, 32, torch.float32, True, 1, 16, Tile(16, 64, 16, 4, 3))
FAST = LinearEntry(4096, 4096, torch.bfloat16, True, 65, 128, fitted(next(iter(HOPPER_TILES)), torch.bfloat16))
HEAD = HeadEntry(140, 32, torch.float32, False, 1, 8, HeadTile(16, 128, 16, 2, 2))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A process that has not asked for a schedule yet."""
    monkeypatch.setattr(tuned, "_IN_USE", tuned._InUse())
    monkeypatch.setattr(CONFORMANCE, "_notes", {})
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.head_tile.cache_clear()
    yield
    tuned.head_tile.cache_clear()


def write(path, *entries, **changed):
    content = {"format": tuned.FORMAT, "for": tuned.plan_fields(HOPPER), "linear": [], "head": [], **changed}
    for entry in entries:
        content["linear" if isinstance(entry, LinearEntry) else "head"].append(tuned.to_json(entry))
    path.write_text(json.dumps(content))
    return path


def test_a_table_comes_back_as_it_was_written(tmp_path):
    table = tuned.read(write(tmp_path / "t.json", LINEAR, FAST, HEAD), HOPPER)
    assert (table.linear, table.head) == ((LINEAR, FAST), (HEAD,))
    assert len(table.sha256) == 64


def planted(entry, part="tile", **values):
    """The JSON of an entry, with other values."""
    raw = tuned.to_json(entry)
    target = raw["tile"] if part == "tile" else raw
    target.update(values)
    return raw


@pytest.mark.parametrize(("kind", "raw", "reason"), [
    ("linear", planted(LINEAR, block_k=32), "is another plan: float32 sums are of blocks of 16 k"),
    ("linear", planted(LINEAR, split_k=2), "unexpected keyword argument 'split_k'"),
    ("linear", planted(LINEAR, part="entry", leaves=2), "unexpected keyword argument 'leaves'"),
    ("linear", planted(LINEAR, block_n=48), "is no schedule that scripts/tune.py tries here"),
    ("linear", planted(FAST, groups=5), "is no schedule that scripts/tune.py tries here"),
    ("linear", planted(FAST, part="entry", dtype="float32"), "is another plan"),
    ("linear", planted(FAST, part="entry", boxes=False), "is no schedule that scripts/tune.py tries here"),
    ("linear", planted(LINEAR, part="entry", kind="Split"), "kind='Split' is unknown"),
    ("linear", planted(LINEAR, part="entry", dtype="float64"), "dtype='float64' is not supported"),
    ("linear", {"kind": "Tile"}, "'tile'"),
    ("head", planted(HEAD, block_n=64), "block_n=64; the plan's blocks are 128 ids wide"),
    ("head", planted(HEAD, block_k=32), "is another plan: float32 sums are of 16 channels"),
    ("head", planted(HEAD, num_stages=9), "is no schedule that scripts/tune.py tries here"),
])  # fmt: skip
def test_a_schedule_that_is_not_in_the_plan_or_not_proven_is_refused(kind, raw, reason, tmp_path):
    path = write(tmp_path / "t.json", **{kind: [raw]})
    with pytest.raises(ValueError, match=rf"t.json: {kind}\[0\] is refused: ") as refused:
        tuned.read(path, HOPPER)
    assert reason in str(refused.value)


def test_a_draw_takes_no_tile_of_two_blocks(tmp_path):
    wide = HeadEntry(500, 64, torch.bfloat16, False, 1, 512, HeadTile(128, 256, 64, 8, 3, tma=True))
    tuned.read(write(tmp_path / "t.json", wide), HOPPER)
    with pytest.raises(ValueError, match="no schedule"):
        tuned.read(write(tmp_path / "t.json", head=[planted(wide, part="entry", sample=True)]), HOPPER)


def test_a_table_of_another_machine_plan_or_triton_is_refused(tmp_path):
    path = write(tmp_path / "t.json", LINEAR)
    with pytest.raises(ValueError, match="made for architecture=sm_90, here it is sm_80"):
        tuned.read(path, (8, 0))
    for name in ("triton", "plan.linear", "plan.vocab"):
        other = {**tuned.plan_fields(HOPPER), name: "another"}
        with pytest.raises(ValueError, match=f"made for {name}=another"):
            tuned.read(write(tmp_path / "t.json", **{"for": other}), HOPPER)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}'])
def test_what_is_no_table_is_refused(text, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"t\.json: (not a table|no table)"):
        tuned.read(path, HOPPER)
    with pytest.raises(ValueError, match="no table of schedules can be read"):
        tuned.read(tmp_path / "absent.json", HOPPER)


def test_only_a_named_table_is_used_and_the_report_names_it(tmp_path, monkeypatch):
    layer = Layer(48, 32, torch.float32, 1, HOPPER, True)
    assert tuned.linear_tile(layer, 5, torch.float32) is None
    assert "tuned" not in CONFORMANCE.report()
    with pytest.raises(RuntimeError, match="have been chosen"):
        tuned.use(tmp_path / "t.json")
    monkeypatch.setattr(tuned, "_IN_USE", tuned._InUse())
    path = write(tmp_path / "t.json", LINEAR, HEAD)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    assert tuned.linear_tile(layer, 16, torch.float32) == LINEAR.tile
    assert tuned.linear_tiles(layer, torch.float32) == [LINEAR.tile]
    assert tuned.linear_tile(layer, 17, torch.float32) is None
    assert tuned.linear_tile(Layer(48, 32, torch.float32, 2, HOPPER, True), 5, torch.float32) is None
    assert tuned.head_tile(8, 140, 32, torch.float32, HOPPER, False) == HEAD.tile
    assert tuned.head_tile(8, 140, 32, torch.float32, HOPPER, True) is None
    note = CONFORMANCE.report()["tuned"]
    assert (note["path"], note["linear"], note["head"]) == (str(path), 1, 1)
    json.dumps(CONFORMANCE.report())


def test_an_argument_comes_before_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "absent.json"))
    tuned.use(write(tmp_path / "t.json", LINEAR))
    assert tuned.in_use(HOPPER).linear == (LINEAR,)


def test_hoppers_tiles_are_left_out_where_they_can_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("rlalign_kernels.gemm.schedules.hopper_available", lambda architecture: False)
    tuned.use(write(tmp_path / "t.json", FAST))
    assert tuned.linear_tile(Layer(4096, 4096, torch.bfloat16, 1, HOPPER, True), 100, torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [HOPPER, (8, 0)])
def test_every_candidate_is_known(dtype, architecture, monkeypatch):
    monkeypatch.setattr(
        "rlalign_kernels.gemm.schedules.hopper_available", lambda architecture: architecture == HOPPER
    )  # fmt: skip
    layer = Layer(4096, 4096, dtype, 1, architecture, True)
    known = known_tiles(layer)
    for num_rows in (1, 7, 16, 17, 33, 64, 65, 100, 512, 4096, 16384):
        found = candidates(layer, num_rows, dtype)
        assert found and set(found) <= known
    with pytest.raises(NotImplementedError, match="leaves=2"):
        candidates(Layer(4096, 4096, dtype, 2, architecture, True), 1, dtype)


@interpreted
def test_operators_take_the_tables_schedules(tmp_path, monkeypatch):
    from rlalign_kernels.gemm import triton_backend
    from rlalign_kernels.vocab import triton_launches

    tuned.use(write(tmp_path / "t.json", LINEAR, HEAD))
    x, weight = normal(5, 32, seed=1), normal(48, 32, seed=2)
    expected = triton_backend.forward(x, weight, schedule=LINEAR.tile)
    launched = []
    real = triton_backend.Launch
    monkeypatch.setattr(triton_backend, "Launch", lambda *a, **k: launched.append(k["BLOCK_N"]) or real(*a, **k))
    triton_backend._call.cache_clear()
    assert same_bits(linear(x, weight, backend="triton"), expected)
    linear(normal(17, 32, seed=1), weight, backend="triton")
    assert launched == [64, 64]  # the second is the default's
    assert [entry.first_row for entry in tuned.in_use(HOPPER).linear] == [1]
    product = triton_launches._product(x, triton_launches.Head.of(normal(140, 32, seed=3), None, None))
    assert triton_launches._scan_tile(product, False, False) == HEAD.tile
    assert triton_launches._scan_tile(product, False, True) != HEAD.tile
    assert triton_launches._scan_tile(product._replace(boxes=False), False, False) != HEAD.tile
    triton_backend._call.cache_clear()
