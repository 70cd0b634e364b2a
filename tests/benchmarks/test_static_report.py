"""The static report: complete, fresh, within its budget, as the compiler says today; and the means it is made by."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.jit import KernelInterface

from benchmarks.static import report as static_report
from benchmarks.static.assembly import AMDGCN, SASS, by_class, copies_ahead, hot_loop
from benchmarks.static.cases import KERNELS, Case, cases, launch
from benchmarks.static.compilation import compiling_for, disassembled
from benchmarks.static.fingerprints import fingerprint, normalised, sources
from benchmarks.static.occupancy import resident_warps
from benchmarks.static.report import BUDGET, MEASURED, RENEW, broken, case_of, compiled_row, fresh, load
from tidar_kernels import ops
from tidar_kernels.ops._triton.configs import CHIPS, DkdvConfig, ForwardConfig
from tidar_kernels.ops._triton.tables import FOLDING

SHIPPED = [case for chip in CHIPS for case in cases(chip)]
# Every kernel once, where most decode and train; and one of each other family of chips.
SAMPLES = (
    Case("step_attention", "90", "bfloat16", 128),
    Case("sound_keys", "90", "bfloat16", 128),
    Case("combine_splits", "90", "bfloat16", 128),
    Case("attention_forward", "90", "bfloat16", 64),
    Case("attention_dq", "80", "bfloat16", 64),
    Case("attention_dkdv", "90", "bfloat16", 128),
    Case("attention_rows", "90", "bfloat16", 128),
    Case("row_tile_bounds", "90", "bfloat16", 128),
    Case("list_row_runs", "90", "bfloat16", 128),
    Case("append_kv", "90", "bfloat16", 128),
    Case("compact_kv", "90", "bfloat16", 128),
    Case("rotary_append", "90", "bfloat16", 128),
    Case("scan_chunks", "90", "bfloat16", variant="coupled"),
    Case("count_chunks", "90", "bfloat16", variant="coupled"),
    Case("gather_chunks", "90", "bfloat16", variant="coupled"),
    Case("select_rows", "90", "bfloat16", variant="coupled"),
    Case("race_chunks", "90", "bfloat16", variant="coupled"),
    Case("decide", "90", "bfloat16", variant="coupled"),
    Case("linear", "90", "bfloat16", variant="narrow"),
    Case("gated_rows", "120", "bfloat16", variant="down"),
    Case("gated_sum", "gfx942", "bfloat16", variant="sum"),
)


def exponentials_behind_wgmma(lines: Sequence[str]) -> int:
    """Of SASS: exponentials issued while a wgmma is under way, that is before the loop waits for it."""
    under_way, found = False, 0
    for line in lines:
        if SASS.classes["mma"].match(line):
            under_way = True
        elif line.startswith("WARPGROUP.DEPBAR"):
            under_way = False
        elif under_way and SASS.classes["mufu"].match(line):
            found += 1
    return found


# What is measured, of a kernel that takes next to nothing.
NOTHING = dict.fromkeys(MEASURED, 0) | {"registers": 16, "warps": 64, "copies_ahead": 2, "tensor_core": [], "loop": {}}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load()["rows"]
    return found


@pytest.fixture(scope="module")
def budget() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BUDGET.read_text())
    return found


def test_the_report_is_complete(rows: list[dict[str, Any]]) -> None:
    assert [case_of(row) for row in rows] == sorted(SHIPPED), f"run `{RENEW}`"


def test_the_report_is_fresh(rows: list[dict[str, Any]]) -> None:
    kept = fresh(rows)
    stale = [str(case_of(row)) for row in rows if case_of(row) not in kept]
    assert not stale, f"{len(stale)} entries are stale, the first is {stale[0]}: run `{RENEW}`"


def test_the_report_keeps_the_budget(rows: list[dict[str, Any]], budget: dict[str, Any]) -> None:
    assert not broken(rows, budget)


def test_no_step_kernel_spills_in_its_hot_loop(rows: list[dict[str, Any]]) -> None:
    """Whatever is excused: the loop over whole tiles loads from no local memory and stores to none."""
    spilling = [str(case_of(row)) for row in rows if row["kernel"] == "step_attention" and row["loop"].get("local")]
    assert not spilling


@pytest.mark.parametrize("chip", FOLDING)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_several_splits_cost_few_instructions(rows: list[dict[str, Any]], chip: int, head_dim: int) -> None:
    """The hot loop of a program that has several splits is at most 7 % longer than that of a program that has one."""
    found = {
        row["variant"]: sum(row["loop"].values())
        for row in rows
        if (row["kernel"], row["chip"], row["dtype"]) == ("step_attention", str(chip), "bfloat16")
        and row["head_dim"] == head_dim
    }
    assert max(found["one program"], found["two programs"]) <= 1.07 * found[""]


def test_the_budget_has_no_exception_without_need(rows: list[dict[str, Any]], budget: dict[str, Any]) -> None:
    """Each has a reason, and without it something would break."""
    for exception in budget["exceptions"]:
        assert exception["reason"]
        without = {**budget, "exceptions": [other for other in budget["exceptions"] if other is not exception]}
        assert broken(rows, without), exception


def test_no_kernel_is_left_out() -> None:
    """Whatever is launched is a function of `tidar_kernels.ops` whose name ends in `_kernel`."""
    names = [info.name for info in walk_packages(ops.__path__, "tidar_kernels.ops.")]
    modules = [import_module(name) for name in names if name.split(".")[-1].startswith("triton")]
    found = {name for module in modules for name, value in vars(module).items() if isinstance(value, KernelInterface)}
    assert {name.removesuffix("_kernel") for name in found if name.endswith("_kernel")} == set(KERNELS)


def test_samples_are_of_every_kernel() -> None:
    assert sorted(case.kernel for case in SAMPLES) == sorted(KERNELS)
    assert set(SAMPLES) <= set(SHIPPED)


@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_a_fresh_compilation_says_the_same(case: Case, rows: list[dict[str, Any]], budget: dict[str, Any]) -> None:
    found, is_same_compiler = compiled_row(case), load()["triton"] == triton.__version__
    # Another compiler may need other registers; it must not spill or leave the tensor cores.
    assert not broken([found], budget if is_same_compiler else {**budget, "warps": {}})
    if is_same_compiler:
        (kept,) = (row for row in rows if case_of(row) == case)
        assert found == kept, f"run `{RENEW}`"


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_dq", "attention_dkdv"])
def test_rows_that_start_anywhere_do_not_spill(kernel: str, budget: dict[str, Any]) -> None:
    """Heads of 72 elements: no entry of the tables, and no multiple of 16."""
    assert not broken([compiled_row(Case(kernel, "90", "bfloat16", 72))], budget)


def test_lse_and_delta_are_loaded_during_the_products() -> None:
    """In the loop of dK and dV on cc 90 no plain load comes before the first product any more."""
    found = []
    for ahead in (False, True):
        planned = launch(Case("attention_dkdv", "90", "bfloat16", 128), DkdvConfig(32, 128, 8, 4, ROWS_AHEAD=ahead))
        with compiling_for(90):
            loop = hot_loop(disassembled(planned.compile().asm["cubin"]), SASS)
        first = next(at for at, line in enumerate(loop) if SASS.classes["mma"].match(line))
        found.append([sum(line.startswith("LDG.") for line in part) for part in (loop[:first], loop[first:])])
    assert found == [[8, 0], [0, 8]]


def test_scores_ahead_hide_the_softmax_behind_wgmma() -> None:
    """Exponentials are issued while the next tile's scores are multiplied; in the plain order not one is."""
    found = []
    for ahead in (False, True):
        planned = launch(
            Case("attention_forward", "90", "bfloat16", 128), ForwardConfig(128, 64, 8, 4, SCORES_AHEAD=ahead)
        )
        with compiling_for(90):
            binary = planned.compile().asm["cubin"]
        found.append(exponentials_behind_wgmma(hot_loop(disassembled(binary), SASS)))
    assert found[0] == 0
    assert found[1] >= 16  # of 32 a thread


def test_spills_are_caught(budget: dict[str, Any]) -> None:
    """A configuration that does not ship, because it spills."""
    row = compiled_row(Case("step_attention", "90", "float32", 128, "one split"), ForwardConfig(16, 32, 4, 2))
    assert {line.split(": ")[1] for line in broken([row], budget)} >= {"stack_bytes", "local_accesses", "spill_bytes"}


def test_a_kernel_off_wgmma_is_caught(budget: dict[str, Any]) -> None:
    """32 rows are below the 64 that wgmma takes."""
    row = compiled_row(Case("step_attention", "90", "bfloat16", 64, "one split"), ForwardConfig(32, 64, 4, 2))
    assert row["tensor_core"] == ["HMMA"]
    assert any("tensor_core: expected HGMMA, got ['HMMA']" in line for line in broken([row], budget))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shared_bytes": 228 * 1024}, "shared_bytes: expected <= 232448, got 233472"),
        ({"registers": 256}, "registers: expected <= 255, got 256"),
        ({"spill_bytes": 4}, "spill_bytes: expected <= 0, got 4"),
        ({"warps": 0}, "warps: expected >= "),
        ({"copies_ahead": 0}, "copies_ahead: expected >= 1, got 0"),
        ({"copies_ahead": None}, "copies_ahead: expected >= 1, got None"),
        ({"tensor_core": []}, "tensor_core: expected HGMMA, got []"),
    ],
)
def test_what_breaks_a_budget_is_named(change: dict[str, Any], complaint: str, budget: dict[str, Any]) -> None:
    case = Case("step_attention", "90", "bfloat16", 128)
    row = {**NOTHING, **dataclasses.asdict(case), "registers": 214, "warps": 8, "tensor_core": ["HGMMA"]}
    assert broken([row], budget) == []
    (line,) = broken([row | change], budget)
    assert line.startswith(f"{case}: {complaint}")


def test_warps_are_accepted_as_the_least_of_a_budget(rows: list[dict[str, Any]]) -> None:
    """What was accepted passes, and one warp less does not; the rest of the budget stays."""
    found = json.loads(static_report.with_warps_of(rows, BUDGET.read_text()))
    assert not broken(rows, found)
    assert {name: found[name] for name in found if name != "warps"} == {
        name: value for name, value in json.loads(BUDGET.read_text()).items() if name != "warps"
    }
    poorer = [rows[0] | {"warps": rows[0]["warps"] - 1}]
    assert "warps: expected >= " in broken(poorer, found)[0]


APPEND = [case for case in cases(90) if case.kernel == "append_kv"]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Compiled cases, without compiling them; `select_rows` fails."""
    done: list[Case] = []

    def attempt(case: Case) -> dict[str, Any] | str:
        done.append(case)
        row = {**dataclasses.asdict(case), "config": {}, **NOTHING, "fingerprint": fingerprint(launch(case))}
        return "no" if case.kernel == "select_rows" else row

    monkeypatch.setattr(static_report, "_attempt", attempt)
    return done


def test_only_what_is_missing_or_stale_is_compiled(
    tmp_path: Path, no_compiler: list[Case], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    found, failed = static_report.renew(path, APPEND, jobs=1)
    assert (no_compiler, failed, len(found)) == (APPEND, 0, len(APPEND))
    kept = load(path)
    assert kept["triton"] == triton.__version__
    assert path.read_text().count("\n") == len(APPEND) + 2  # an entry a line

    no_compiler.clear()
    changed = copy.deepcopy(kept["rows"])
    changed[1]["fingerprint"] = "of older sources"
    changed[2]["kernel"] = "of_older_sources"
    static_report.write(path, triton.__version__, changed)
    static_report.renew(path, APPEND, jobs=1)
    assert no_compiler == [case_of(row) for row in kept["rows"][1:3]]
    assert load(path) == kept

    no_compiler.clear()
    static_report.write(path, "another", kept["rows"])
    static_report.renew(path, APPEND[:1], jobs=1)
    assert no_compiler == APPEND[:1]
    assert [case_of(row) for row in load(path)["rows"]] == APPEND[:1]  # no mixture of two compilers
    assert "0 of 1 entries are fresh" in capsys.readouterr().err


def test_the_command(
    tmp_path: Path, no_compiler: list[Case], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    chosen = ["--out", str(path), "--chips", "90", "--jobs", "1"]
    assert static_report.main([*chosen, "--kernels", "append_kv,select_rows"]) == 1
    out, err = capsys.readouterr()
    assert f"{len(APPEND)} entries, 1 failed" in out
    assert "no\n" in err
    with pytest.raises(SystemExit):
        static_report.main([*chosen, "--kernels", "append"])
    assert "--kernels: expected some of sound_keys," in capsys.readouterr().err


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _kernel(x, n, BLOCK: tl.constexpr):
    """Adds."""
    at = x + tl.arange(0, BLOCK)
    tl.store(at, _twice(tl.load(at)), mask=tl.arange(0, BLOCK) < n)


def test_fingerprints_follow_what_a_binary_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("append_kv", "90", "bfloat16", 128)
    plain = launch(case)
    assert fingerprint(plain) == fingerprint(launch(case))
    assert fingerprint(plain) != fingerprint(launch(dataclasses.replace(case, dtype="float32")))
    assert fingerprint(plain) != fingerprint(launch(dataclasses.replace(case, head_dim=64)))
    assert fingerprint(plain) != fingerprint(plain._replace(options=plain.options | {"num_warps": 8}))
    step = Case("step_attention", "90", "bfloat16", 128)
    assert fingerprint(launch(step)) != fingerprint(launch(step, ForwardConfig(64, 64, 8, 2)))


def test_fingerprints_follow_device_functions() -> None:
    assert sorted(sources(_kernel)) == ["_kernel", "_twice"]
    assert "Adds" not in sources(_kernel)["_kernel"]


def test_comments_do_not_count() -> None:
    plain = "def f(x):\n    y = x + 1\n    return y\n"
    same = 'def f(x):  # adds\n    """Adds\n    one."""\n\n    # so\n    y = x + 1\n    return y\n'
    assert normalised(same) == normalised(plain)
    assert normalised(plain.replace("x + 1", "(x\n        + 1)")) == normalised(plain.replace("x + 1", "(x + 1)"))
    assert normalised(plain.replace("1", "2")) != normalised(plain)
    assert normalised(plain.replace("    return", "return")) != normalised(plain)


LISTING = """
.text.kernel:
        /*0000*/                   S2R R19, SR_CTAID.X ;
        /*0010*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R8, R4 ;
.L_x_4:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2 ;
        /*0060*/              @!P0 BRA `(.L_x_4) ;
        /*0070*/                   FFMA R1, R2, R3, R4 ;
        /*0080*/               @P0 MUFU.EX2 R1, R2 ;
        /*0090*/               @P2 EXIT ;
        /*00a0*/                   LDGSTS.E.128 [R1], [R2.64] ;
        /*00b0*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_0:
        /*00c0*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00d0*/                   STL [R1], R2 ;
        /*00e0*/                   EXIT ;
.L_x_6:
        /*00f0*/                   BRA `(.L_x_6);
"""


def test_the_hot_loop_of_sass() -> None:
    """The loop with tensor cores, with its conditional exits and the wait inside it, and nothing after it."""
    found = by_class(hot_loop(LISTING, SASS), SASS)
    once = dict.fromkeys(("fma", "mufu", "shared", "global"), 1)
    assert {name: count for name, count in found.items() if count} == once | {"mma": 2, "other": 4}
    without = by_class(hot_loop(LISTING.replace("HMMA", "MOV"), SASS), SASS)
    assert (without["mma"], without["fma"]) == (0, 1)
    assert hot_loop("\n".join(LISTING.splitlines()[:6]), SASS) == []
    assert by_class([], SASS) == {}


def test_the_hot_loop_of_amdgcn() -> None:
    text = """
    s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Loop Header
    ds_read_b128 v[0:3], v4 ; a comment
.LBB0_2:
    v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
    v_exp_f32_e32 v1, v1
    s_cbranch_vccnz .LBB0_2
    s_branch .LBB0_1
.LBB0_3:
    s_endpgm
"""
    found = by_class(hot_loop(text, AMDGCN), AMDGCN)
    assert {name: count for name, count in found.items() if count} == {"mma": 1, "mufu": 1, "other": 1}


def test_what_a_loop_hides_behind_its_products() -> None:
    """The wait that lets the fewest copies stay under way counts, and exponentials between a wgmma and its wait."""
    lines = [
        "MUFU.EX2 R0, R1",
        "DEPBAR.LE SB0, 0x4",
        "HGMMA.64x64x16.F32 R8, R4",
        "MUFU.EX2 R0, R1",
        "@P0 MUFU.EX2 R0, R1",
    ]
    lines += ["WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R0, R1", "DEPBAR.LE SB0, 0x2"]
    assert copies_ahead(lines) == 2
    assert exponentials_behind_wgmma(lines) == 2
    assert copies_ahead(lines[2:5]) is None


@pytest.mark.parametrize(
    ("arguments", "warps"),
    [
        ((90, 32, 0, 4), 64),  # by warps
        ((90, 168, 0, 8), 8),  # by registers: 12 warps fit, in blocks of 8
        ((90, 32, 98304, 8), 16),  # by shared memory
        ((86, 32, 0, 1), 16),  # by blocks
        ((86, 32, 100 * 1024, 8), 0),  # not one
        ((100, 32, 0, 4, 256), 8),  # by tensor memory
        (("gfx942", 256, 0, 4), 8),
        (("gfx942", 64, 40 * 1024, 4), 4),
        (("gfx950", 64, 40 * 1024, 4), 16),
    ],
)
def test_resident_warps(arguments: tuple[Any, ...], warps: int) -> None:
    assert resident_warps(*arguments) == warps
