"""Two trees side by side: tiles are those of the mask, loads those of the loop, predictions within the chip's rates."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.static import trees
from benchmarks.static.assembly import load_to_use
from benchmarks.static.clocks import H200, LOAD_CLOCKS, clocks_of_tile
from tidar_kernels import Pattern, patterns


@pytest.mark.parametrize("pattern", [patterns.causal(200), patterns.tidar_training(90, 7), patterns.causal(64)])
@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 64), (64, 32)])
def test_tiles_are_those_of_the_mask(pattern: Pattern, block_m: int, block_n: int) -> None:
    dense = pattern.dense(0)
    blocks = [rows.split(block_n, dim=1) for rows in dense.split(block_m)]
    assert trees.tiles(pattern, block_m, block_n, once=True) == sum(bool(x.any()) for row in blocks for x in row)
    both = trees.tiles(pattern, block_m, block_n, once=False)
    assert both >= trees.tiles(pattern, block_m, block_n, once=True)


def test_what_stands_between_a_load_and_its_use() -> None:
    lines = [
        "LDG.E.64 R168, desc[UR14][R152.64+0x20]",
        "IMAD.MOV.U32 R16, RZ, RZ, R16",
        "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR20], R24",
        "@P0 LDG.E R7, desc[UR14][R154.64]",
        "FMUL R1, R169, UR5",
        "LDGSTS.E.BYPASS.128 [R161+0x10000], desc[UR52][R152.64], !P0",
    ]
    assert load_to_use(lines) == (3, 1)
    assert load_to_use([lines[3], *lines[1:3]]) == (2, 1)  # never used: a whole turn
    assert load_to_use([*lines[4:5], lines[2], lines[0], lines[1]]) == (1, 0)  # used in the next turn
    assert load_to_use([lines[5], lines[1]]) is None


def test_a_loop_waits_for_a_load_that_comes_too_late() -> None:
    config = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    loop = {"mma": 12, "fma": 0, "mufu": 0, "shared": 0, "global": 1, "local": 0, "barrier": 0, "other": 87}
    row = {"config": config, "loop": loop, "warps": 8, "head_dim": 128, "tensor_core": ["HGMMA"]}
    plain = clocks_of_tile(row, 3, H200)
    assert clocks_of_tile(row | {"load_to_use": (25, 0)}, 3, H200) == pytest.approx(plain + LOAD_CLOCKS - 50)
    assert clocks_of_tile(row | {"load_to_use": (99, 12)}, 3, H200) == plain
    ahead = clocks_of_tile(row | {"config": config | {"SCORES_AHEAD": True}}, 3, H200)
    assert ahead == pytest.approx(plain - 100 * 8 / 4)
    assert clocks_of_tile(row | {"warps": 16}, 3, H200) == ahead


def test_the_file_holds_both_trees_and_what_is_predicted_of_them() -> None:
    found = json.loads(trees.RESULTS.read_text())
    assert found["before"]["commit"] != found["after"]["commit"]
    for part in (found["before"], found["after"]):
        assert trees.predicted(part["rows"]) == part["predicted"]
        for one in part["predicted"]:
            most = trees.CHIPS[one["chip"]].flops_per_s / 1e12
            assert 0 < one["forward"] < most
            assert 0 < one["backward"] < most * 5 / 7  # seven products are multiplied, five are counted


def test_this_tree_compiles_in_a_process_of_its_own() -> None:
    (row,) = trees.compiled(trees.HERE, [("attention_dkdv", 90, 128)])
    assert row["tensor_core"] == ["HGMMA"]
    assert row["loop"]["mma"]
    assert row["load_to_use"][1] > 0  # lse and delta are loaded during the products
