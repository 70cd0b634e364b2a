"""The forward kernel for Hopper in Gluon: its own text on threads, what the compiler makes of it, and when it is used.

No interpreter runs Gluon. What is proven is the kernel's logic (tests/ops/gluon.py) and its binary, not its speed.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tidar_kernels
from benchmarks.static import tune
from benchmarks.static.cases import Case, configured, launch
from benchmarks.static.compilation import compile_report, compiling_for, disassembled
from tests.ops.gluon import Chip, imported
from tidar_kernels import eager, patterns
from tidar_kernels.ops._triton import configs, tables
from tidar_kernels.ops._triton.configs import EXTRAS, PLAIN, SpecialisedConfig, attention_config
from tidar_kernels.ops.operands import Keys, Rows, Scores
from tidar_kernels.patterns import Pattern
from tidar_kernels.testing import attention as testing
from tidar_kernels.testing import budget, irregular_pattern

FILE = Path(tidar_kernels.__file__).parent / "ops" / "attention" / "gluon_forward.py"
CASE = Case("attention_forward", "90", "bfloat16", 128)
ENTRY = SpecialisedConfig(128, 128, 4, 2)
gluon = pytest.mark.skipif(not configs.has_gluon(), reason="this Triton has no Gluon for Hopper")


def run(case: testing.AttentionCase, config: SpecialisedConfig, seed: int, path: Path = FILE) -> None:
    """The kernel against its twin by the budget rule, on threads; nothing is written but the results."""
    chip = Chip(seed)
    kernels = imported(path, "tidar_kernels.ops.attention.gluon_forward_on_threads", chip)
    operands = testing.attention_operands(case)
    q, k, v = (guarded.tensor for guarded in (operands.q, operands.k, operands.v))
    lead, own, _ = case.pattern.on("cpu")
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    launches, out, lse = kernels.plan_specialised(Rows(q, lead, own), Keys(k, v), Scores(scale), config)
    out.fill_(torch.nan)
    lse.fill_(torch.nan)
    for one in launches:
        chip.run(one)
    for name, memory in vars(operands).items():
        if memory is not None:
            memory.check(name)

    def twin(dtype: torch.dtype) -> Any:
        cast = (x.to(dtype) for x in (q, k, v))
        return eager.attention(*cast, case.pattern, case.scale, return_lse=True)

    exact, plain = twin(torch.float64), twin(case.dtype)
    budget(out, exact[0], plain[0], "out")
    budget(lse, exact[1], plain[1], "lse")
    blind = ~case.pattern.dense().any(1)
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == -torch.inf).all()


def case_of(name: str, pattern: Pattern, **changes: Any) -> testing.AttentionCase:
    given: dict[str, Any] = {"batch": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32, "dtype": torch.bfloat16}
    return testing.AttentionCase(name, pattern, **(given | changes))


PATTERNS = {
    "causal": patterns.causal(200),
    "one_row": patterns.causal(1),
    "TiDAR": patterns.tidar_training(150, 16),
    "whole_tiles": patterns.tidar_training(128, 64),
    "documents": patterns.packed([patterns.tidar_training(s, 4) for s in (9, 1, 90)]),
    "window": patterns.tidar_training(150, 16).windowed(40),
    "irregular": irregular_pattern(150, 110, seed=1),
    "no_keys": irregular_pattern(6, 0),
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_the_kernel_on_threads_is_its_twin(name: str, stages: int) -> None:
    run(case_of(name, PATTERNS[name]), SpecialisedConfig(128, 32, 4, stages), seed=stages)


@pytest.mark.parametrize("changes", [
    {"batch": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float16},
    {"head_dim": 20},
    {"layout": "gaps"},
    {"layout": "bhdn"},
    {"layout": "bnhd"},
    {"layout": "shared_heads"},
    {"batch": 0},
    {"scale": 8.0},
], ids=str)  # fmt: skip
def test_shapes_and_layouts(changes: dict[str, Any]) -> None:
    run(case_of("shapes", patterns.tidar_training(75, 8), **changes), SpecialisedConfig(128, 64, 4, 2), seed=7)


@pytest.mark.thorough
@pytest.mark.parametrize(("text", "instead"), [
    ("mbarrier.wait(v_free.index(stage), before)", "pass"),
    ("mbarrier.wait(k_full.index(stage), phase)", "pass"),
    ("mbarrier.wait(v_full.index(stage), phase)", "mbarrier.wait(v_full.index(stage), phase ^ 1)"),
    ("mbarrier.init(k_free.index(stage), count=2)", "mbarrier.init(k_free.index(stage), count=1)"),
    ("    mbarrier.arrive(k_free.index(stage))", "    pass"),
    ("first + beside, full_end", "first + beside + 1, full_end"),
    ("full + i, gl.where", "full + i + 1, gl.where"),
    ("(n[None, :] < hi[:, None])", "(n[None, :] <= hi[:, None])"),
    ("k.block_type.nbytes)", "k.block_type.nbytes // 2)"),
])  # fmt: skip
def test_a_fault_in_the_kernel_is_seen(
    text: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait too few, a phase that is wrong, a buffer that is given back too early, another tile, another mask."""
    monkeypatch.setattr("tests.ops.gluon.PATIENCE_S", 1.0)
    source = FILE.read_text()
    assert source.count(text) == 1
    changed = tmp_path / "gluon_forward.py"
    changed.write_text(source.replace(text, instead))

    def some_runs() -> None:
        for seed in range(5):
            run(case_of("fault", PATTERNS["TiDAR"]), SpecialisedConfig(128, 32, 4, 2), seed, changed)

    with pytest.raises((AssertionError, TimeoutError)):
        some_runs()


@gluon
@pytest.mark.parametrize(("dtype", "head_dim", "config"), [
    ("bfloat16", 128, ENTRY),
    ("float16", 64, SpecialisedConfig(128, 128, 4, 3)),
    ("bfloat16", 80, SpecialisedConfig(128, 64, 4, 4)),
])  # fmt: skip
def test_it_compiles_without_spills(dtype: str, head_dim: int, config: SpecialisedConfig) -> None:
    """TMA, wgmma, mbarriers and registers handed from the loader to those that multiply; nothing in local memory."""
    planned = launch(Case("attention_forward", "90", dtype, head_dim), config)
    report = compile_report(planned, 90, read_binary=True)
    assert (report.stack_bytes, report.spill_bytes, report.local_accesses) == (0, 0, 0)
    assert report.tensor_core == ("HGMMA",)
    assert report.warps == 12
    assert (report.loop["global"], report.loop["shared"]) == (0, 0)  # those that multiply copy nothing
    assert report.loop["mma"] == -(-head_dim // 64) * 64 // 16 + config.BLOCK_N // 16
    with compiling_for(90):
        compiled = planned.compile()
    sass = disassembled(compiled.asm["cubin"])
    for instruction in ("UTMALDG", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "USETMAXREG"):
        assert re.search(rf"\b{re.escape(instruction)}", sass), instruction
    assert not re.search(r"\b(LDGSTS|LDL|STL)\b", sass)
    assert "mbarrier.try_wait" in compiled.asm["ptx"]


@gluon
def test_it_runs_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nowhere, until a GPU has measured it; then for half operands without a cap and sinks, where there is Gluon."""
    kernel = import_module("tidar_kernels.ops.attention.triton_forward").attention_forward_kernel
    for chip, head_dim in ((chip, head_dim) for chip in configs.CHIPS for head_dim in configs.HEAD_DIM_TILES):
        found = attention_config("forward", chip, torch.bfloat16, head_dim)
        assert not isinstance(found, SpecialisedConfig)
    monkeypatch.setitem(tables.TABLES["forward"][90], "half specialised", {128: ENTRY})
    attention_config.cache_clear()
    try:
        assert attention_config("forward", 90, torch.bfloat16, 128) is ENTRY
        assert launch(CASE).kernel is not kernel
        for dtype, head_dim, kind in (
            (torch.float32, 128, PLAIN), (torch.bfloat16, 64, PLAIN), (torch.bfloat16, 128, EXTRAS),
        ):  # fmt: skip
            assert not isinstance(attention_config("forward", 90, dtype, head_dim, kind), SpecialisedConfig)
        assert not isinstance(attention_config("forward", 100, torch.bfloat16, 128), SpecialisedConfig)
        attention_config.cache_clear()
        monkeypatch.setattr(configs, "has_gluon", lambda: False)
        assert launch(CASE).kernel is kernel
    finally:
        monkeypatch.undo()
        attention_config.cache_clear()


def test_a_triton_without_gluon_has_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    configs.has_gluon.cache_clear()
    try:
        assert not configs.has_gluon()
        assert not any(isinstance(one, SpecialisedConfig) for one in tune.candidates(CASE))
    finally:
        monkeypatch.undo()
        configs.has_gluon.cache_clear()


@pytest.mark.cuda
@gluon
@pytest.mark.parametrize(
    "name", ["large", "large_fp16", "large_d64", "group_7", "documents", "irregular", "strided_heads"]
)
@pytest.mark.parametrize("block_n", [64, 128])
def test_parity_on_hopper(name: str, block_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("written for compute capability 9.0")
    monkeypatch.setattr(
        "tidar_kernels.ops.attention.triton_forward.attention_config",
        lambda *arguments: SpecialisedConfig(128, block_n, 4, 2),
    )
    (case,) = (one for one in testing.ATTENTION_CASES_LARGE if one.name == name)
    testing.check_attention(case, "cuda")
    testing.check_attention_repeats(case, "cuda")


@gluon
def test_tuning_tries_it() -> None:
    found = [one for one in tune.candidates(CASE) if isinstance(one, SpecialisedConfig)]
    assert ENTRY in found
    for other in (
        Case("attention_forward", "100", "bfloat16", 128),
        Case("attention_forward", "90", "float32", 128),
        Case("attention_forward", "90", "bfloat16", 128, EXTRAS),
        Case("step_attention", "90", "bfloat16", 128),
    ):
        assert not any(isinstance(one, SpecialisedConfig) for one in tune.candidates(other))
    trial = tune.Trial(ENTRY, 168, 164208, 12, 100.0)
    assert tune.source([(CASE, trial, "100.0 us")]).splitlines() == [
        '# TABLES["forward"][90]["half specialised"]',
        "128: SpecialisedConfig(128, 128, 4, 2),  # 100.0 us",
    ]
    with configured(CASE, ENTRY):
        assert launch(CASE).options["STAGES"] == ENTRY.num_stages
