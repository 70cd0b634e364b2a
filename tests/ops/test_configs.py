"""Launch tables: which chip takes which, what is inherited, and what a configuration may depend on."""

from __future__ import annotations

import inspect
import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.static.occupancy import LIMITS
from tidar_kernels import patterns, testing
from tidar_kernels.ops._triton import configs
from tidar_kernels.ops._triton import linear_tables as linear_configs
from tidar_kernels.ops._triton.configs import HEAD_DIM_TILES, Chip, attention_config, entries, nearest_chip, step_config
from tidar_kernels.ops._triton.tables import ANY, CHIPS, FOLDING, PARENTS, TABLES
from tidar_kernels.ops.operands import Cached, Keys, Rows, Scores
from tidar_kernels.ops.step_attention import triton as step_attention

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# (kernel, chip, head dim) in float32, and why there are no tiles.
WITHOUT_TILES = {
    **dict.fromkeys(
        itertools.product(("dq", "dkdv"), (86, 89, 120), (512,)),
        "the least tiles take 128 kB of shared memory, of 99",
    ),
    **dict.fromkeys(itertools.product(("dq", "dkdv"), (80,), (512,)), "86, which cannot run them, would inherit them"),
    **dict.fromkeys(
        itertools.product(("dq", "dkdv"), ("gfx942", "gfx950"), (512,)), "the least tiles of dq use 900 bytes of stack"
    ),
}


@pytest.fixture
def ask_anew() -> None:
    nearest_chip.cache_clear()
    configs._chip_of.cache_clear()


def test_every_chip_has_every_configuration() -> None:
    assert set(CHIPS) == set(PARENTS) == set(LIMITS)
    for chip in CHIPS:
        for kernel in TABLES:
            for is_float32 in (False, True):
                without = {dim for dim in HEAD_DIM_TILES if is_float32 and (kernel, chip, dim) in WITHOUT_TILES}
                for kind in configs.KINDS:
                    found = set(entries(kernel, chip, is_float32, kind))
                    assert found >= set(HEAD_DIM_TILES) - without
                    assert not found & without
        for dtype in DTYPES:
            for role in ("base", *linear_configs.ROLES[2:]):
                assert linear_configs.linear_config(role, chip, dtype, 4096).num_warps


@pytest.mark.parametrize(("kernel", "chip", "head_dim"), WITHOUT_TILES)
def test_what_has_no_tiles_is_refused_by_name(kernel: str, chip: Chip, head_dim: int) -> None:
    for asked in (head_dim // 2 + 1, head_dim):
        expected = f"a head_dim of at most {head_dim // 2} for the kernel '{kernel}' in torch.float32 on {chip}"
        with pytest.raises(ValueError, match=f"^q: expected {re.escape(expected)}, got {asked}$"):
            attention_config(kernel, chip, torch.float32, asked)


def test_no_table_has_a_place_that_nothing_reads() -> None:
    classes = {f"{dtype} {kind}".strip() for dtype in ("half", "float32") for kind in configs.KINDS}
    for table in (*TABLES.values(), linear_configs.TABLE):
        assert set(table) <= {*CHIPS, ANY}
        assert all(set(part) <= classes for part in table.values())


def test_entries_are_inherited_and_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other, own = (configs.TileConfig(16 * i, 16, 4, 1) for i in (1, 2, 3))
    table = {80: {"half": {64: plain, 128: plain}, "half extras": {128: other}}, 86: {"half": {64: own}}}
    monkeypatch.setitem(TABLES, "made up", table)
    assert entries("made up", 86, False) == {64: own, 128: plain}
    assert entries("made up", 120, False, configs.EXTRAS) == {64: own, 128: other}
    assert entries("made up", 80, False) == {64: plain, 128: plain}
    assert attention_config("made up", 89, torch.float16, 65) == plain


@pytest.mark.parametrize(
    ("chip", "nearest"),
    [(75, 86), (87, 86), (103, 100), (121, 120), (200, 120), ("gfx90a", "gfx942"), ("gfx951", "gfx950")],
)
def test_an_unknown_chip_takes_the_nearest_and_says_so_once(chip: Chip, nearest: Chip, ask_anew: None) -> None:
    with pytest.warns(RuntimeWarning, match=rf"^{chip}: no launch table for this chip, that of {nearest} serves it$"):
        assert nearest_chip(chip) == nearest
    assert nearest_chip(chip) == nearest  # a second warning would be an error


@pytest.mark.parametrize("chip", CHIPS)
def test_a_known_chip_takes_its_own(chip: Chip, ask_anew: None) -> None:
    assert nearest_chip(chip) == chip


def test_chips_of_devices(monkeypatch: pytest.MonkeyPatch, ask_anew: None) -> None:
    """By compute capability, on ROCm by the architecture's name, whatever the capability says there."""
    monkeypatch.setattr(configs, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    assert configs.chip_of(torch.device("cuda", 0)) == 89
    configs._chip_of.cache_clear()
    amd = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: amd)
    assert configs.chip_of(torch.device("cuda", 0)) == "gfx942"


def test_a_step_is_configured_by_chip_dtype_head_dim_and_kind_alone() -> None:
    """What makes the bits of draft rows those of single tokens: rows, batch and lengths are not asked for."""
    assert list(inspect.signature(step_config).parameters) == ["chip", "dtype", "head_dim", "kind"]
    assert list(inspect.signature(configs.split_size).parameters) == ["chip", "max_len"]
    assert step_config(None, torch.float32, 64) == step_config(None, torch.bfloat16, 256, configs.TREE)


@pytest.mark.parametrize(
    ("tiles", "splits", "programs"),
    [
        (512, 17, 1),  # B = 4, batch 64, 8k: row tiles fill the chip
        (106, 17, 1),  # four fifths of it
        (8, 17, 17),  # B = 4, batch 1
        (140, 5, 5),  # one program a tile would leave the second wave nearly empty
        (192, 17, 2),  # B = 8, batch 8, 8k: 192 programs would use 73 % of two waves, 384 use 97 % of three
        (72, 65, 7),  # B = 16, batch 1, a graph of 32k: 504 programs in the place of 4680
        (32, 65, 12),  # B = 4, batch 4, a graph of 32k: 384 programs use 97 % of three waves
        (288, 17, 3),  # B = 16, batch 4, 8k: 864 programs use 94 % of seven waves, 576 use 87 % of five
        (576, 65, 1),  # B = 16, batch 8
        (0, 1, 1),
    ],
)
def test_who_shares_the_splits_of_a_row_tile(tiles: int, splits: int, programs: int) -> None:
    plain = (128, configs.PLAIN, tiles, splits)
    assert configs.programs_of_a_tile(90, torch.bfloat16, *plain) == programs
    for chip, dtype, head_dim, kind in (
        (90, torch.float32, 128, configs.PLAIN),
        (90, torch.float16, 128, configs.EXTRAS),
        (90, torch.float16, 256, configs.PLAIN),
        ("gfx942", torch.float16, 128, configs.PLAIN),
    ):
        assert configs.programs_of_a_tile(chip, dtype, head_dim, kind, tiles, splits) == splits


@pytest.mark.parametrize("chip", FOLDING)
def test_programs_that_have_several_splits_fill_the_chip(chip: int) -> None:
    """Whatever the number of row tiles: two waves at least, eight at most, 85 % of them used.

    80 % are enough where one program has all splits.
    """
    multiprocessors = configs.MULTIPROCESSORS[chip]
    for tiles in range(1, 10 * multiprocessors):
        programs = configs.programs_of_a_tile(chip, torch.bfloat16, 128, configs.PLAIN, tiles, 65)
        launched = tiles * programs
        waves = -(-launched // multiprocessors)
        if programs == 1:
            assert launched >= 0.8 * waves * multiprocessors
        elif programs < 65:
            assert 2 <= waves <= 8
            assert launched >= 0.85 * waves * multiprocessors
        else:
            assert programs == 65
            assert waves <= 8


def test_a_long_prefill_has_no_partial_results() -> None:
    """32k rows behind 32k of context took 48 GiB of them."""

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    pattern, cache = patterns.causal(32768), meta(1, 8, 65536, 128)
    k, lengths = meta(1, 8, 32768, 128), torch.empty(1, dtype=torch.int32, device="meta")
    rows = Rows(meta(1, 32, 32768, 128), *pattern.rows_on("meta"))
    cached = Cached(cache, cache, lengths, 65536)
    launches, _, _ = step_attention.plan_step_attention(rows, Keys(k, k), cached, Scores(0.1), 90)
    assert [one.kernel.__name__ for one in launches] == ["sound_keys_kernel", "step_attention_kernel"]
    assert launches[1].grid == (8192, 1)


@pytest.mark.interpret
def test_what_runs_on_amd_instead_of_a_choice_between_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a tile that are cached and in flight come by two loads there; here in the interpreter."""
    real, launched = step_attention.Launch, []

    def with_two_loads(kernel: Any, grid: Any, args: Any, options: dict[str, Any]) -> Any:
        if "ONE_LOAD" in options:
            launched.append(options["ONE_LOAD"])
            options = options | {"ONE_LOAD": False}
        return real(kernel, grid, args, options)

    monkeypatch.setattr(step_attention, "Launch", with_two_loads)
    case = testing.StepCase("two_loads", patterns.tidar_step(3), (5, 30), 4, 2, head_dim=16, dtype=torch.float32)
    testing.check_step_attention(case)
    assert launched == [True]
