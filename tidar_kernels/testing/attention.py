"""Cases and checks of the training operator `attention`, forward and backward; the manner is that of `checks`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import eager, ops, patterns
from ..patterns import Pattern
from .builders import irregular_pattern, pairwise
from .harness import (
    Guarded,
    Measure,
    ParityError,
    ParityResult,
    budget,
    check_case,
    check_equal,
    guarded,
    poisoned_allocations,
)

__all__ = [
    "ATTENTION_CASES",
    "ATTENTION_CASES_LARGE",
    "AttentionCase",
    "attention_operands",
    "check_attention",
    "check_attention_repeats",
]


@dataclass(frozen=True)
class AttentionCase:
    """One forward and backward pass of `attention`.

    Args:
        name: for messages; `id` adds the dtype.
        pattern: which rows see what.
        batch, num_heads, num_kv_heads, head_dim, dtype: of the operands.
        layout: strides of q, k, v and of the gradient of out (`tidar_kernels.testing.LAYOUTS`).
        scale: of the scores; None for the default.
        lse_grad: the loss depends on lse too.
        softcap: as in `attention`.
        sinks: with a random sink a head.
    """

    name: str
    pattern: Pattern
    batch: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    layout: str = "bnhd"
    scale: float | None = None
    lse_grad: bool = False
    softcap: float | None = None
    sinks: bool = False

    @property
    def id(self) -> str:
        """Name and dtype."""
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}"


def _documents(seq_len: int, block_size: int) -> Pattern:
    """Two documents, the second with a prompt; of one token, one document without."""
    if seq_len == 1:
        return patterns.tidar_training(1, block_size, [1])
    first = seq_len // 3 + 1
    return patterns.tidar_training(seq_len, block_size, [first, seq_len - first], [0, (seq_len - first) // 2])


TRAINING: dict[str, Callable[[int, int], Pattern]] = {
    "tidar": patterns.tidar_training,
    "documents": _documents,
    "idlm": patterns.idlm_training,
    "block_diffusion": patterns.block_diffusion_training,
    "set_block": patterns.set_block_training,
    "dflash": lambda s, block: patterns.dflash_training(s, [0, s // 3, s], block),
    "jacobi": lambda s, block: patterns.jacobi_forcing_training(s // 4, s),
}


def _covering_cases() -> Iterator[AttentionCase]:
    """Every two of: training pattern, length, block size, heads, head dim, dtype, strides.

    The interpreter's tiles are 32 rows by 32 keys (`kernels/configs.py`).
    """
    rows = pairwise(
        family=tuple(TRAINING),
        seq_len=(1, 7, 64, 200),
        block_size=(1, 5, 16),
        heads=((1, 1), (4, 1), (7, 1)),
        head_dim=(16, 64, 96),
        layout=("bnhd", "bhnd", "gaps", "bhdn"),
        dtype=(torch.float32, torch.float16),
    )
    for row in rows:
        (num_heads, num_kv_heads), seq_len, block_size = row["heads"], row["seq_len"], row["block_size"]
        yield AttentionCase(
            name=f"{row['family']}-S{seq_len}-B{block_size}-h{num_heads}_{num_kv_heads}-d{row['head_dim']}"
            f"-{row['layout']}",
            pattern=TRAINING[row["family"]](seq_len, block_size),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=row["head_dim"],
            dtype=row["dtype"],
            layout=row["layout"],
        )


def _feature_cases() -> Iterator[AttentionCase]:
    """Every two of: window, softcap, sinks, a loss of lse too, training pattern, heads, head dim, dtype."""
    rows = pairwise(
        family=("tidar", "documents", "dflash", "jacobi"),
        window=(None, 1, 5, 20),
        softcap=(None, 1.5),
        sinks=(False, True),
        lse_grad=(False, True),
        heads=((4, 4), (6, 2)),
        head_dim=(16, 80),
        dtype=(torch.float32, torch.float16),
    )
    for row in rows:
        (num_heads, num_kv_heads), family, window = row.pop("heads"), row.pop("family"), row.pop("window")
        pattern = TRAINING[family](37, 8)
        yield AttentionCase(
            name=f"w{window}-c{row['softcap']}-s{int(row['sinks'])}-l{int(row['lse_grad'])}-{family}"
            f"-h{num_heads}_{num_kv_heads}-d{row['head_dim']}",
            pattern=pattern if window is None else pattern.windowed(window),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            **row,
        )


_CASE = AttentionCase("attention", patterns.tidar_training(40, 8), num_heads=2, num_kv_heads=1, head_dim=16)
ATTENTION_CASES: tuple[AttentionCase, ...] = (
    *_covering_cases(),
    replace(_CASE, name="batch", batch=3, num_heads=2, num_kv_heads=2),
    replace(_CASE, name="shared_heads", num_heads=4, num_kv_heads=2, layout="shared_heads"),
    replace(_CASE, name="lse_grad", lse_grad=True),
    replace(_CASE, name="lse_grad_empty_rows", pattern=irregular_pattern(30, 40, seed=5), lse_grad=True),
    replace(_CASE, name="bfloat16", dtype=torch.bfloat16),
    replace(_CASE, name="scale", scale=0.7),
    replace(_CASE, name="sharp_softmax", scale=8.0),
    replace(_CASE, name="head_dim_20", head_dim=20),
    replace(_CASE, name="head_dim_256", head_dim=256, dtype=torch.float16, pattern=patterns.tidar_training(9, 4)),
    replace(_CASE, name="head_dim_512", head_dim=512, dtype=torch.float16, pattern=patterns.tidar_training(9, 4)),
    replace(_CASE, name="prefill", pattern=patterns.tidar_prefill(37, 5)),
    replace(_CASE, name="step", pattern=patterns.tidar_step(4), dtype=torch.float16),
    replace(_CASE, name="one_row", pattern=patterns.causal(1)),
    replace(_CASE, name="causal", pattern=patterns.causal(70), dtype=torch.float16),
    replace(_CASE, name="long_blocks", pattern=patterns.tidar_training(60, 64)),
    replace(_CASE, name="irregular", pattern=irregular_pattern(90, 70)),
    replace(_CASE, name="irregular_fp16", pattern=irregular_pattern(50, 110, seed=1), dtype=torch.float16),
    # Rows of one rank of several: runs from all over the sequence, over all keys.
    replace(
        _CASE,
        name="sharded",
        pattern=patterns.tidar_training(75, 8).subset(
            torch.tensor([*range(16, 32), *range(64, 80), *range(112, 150)], device="cpu")
        ),
    ),
    replace(_CASE, name="no_keys", pattern=irregular_pattern(6, 0)),
    replace(_CASE, name="packed", pattern=patterns.packed([patterns.tidar_training(s, 4) for s in (9, 1, 30)])),
    replace(_CASE, name="softcap_50", softcap=50.0, scale=4.0),
    replace(_CASE, name="softcap_50_fp16", softcap=50.0, scale=4.0, dtype=torch.float16),
    replace(_CASE, name="bfloat16_all", dtype=torch.bfloat16, softcap=2.0, sinks=True, lse_grad=True),
    replace(
        _CASE,
        name="head_dim_256_all",
        head_dim=256,
        dtype=torch.float16,
        pattern=patterns.tidar_training(9, 4).windowed(6),
        softcap=2.0,
        sinks=True,
    ),
    replace(_CASE, name="sinks_empty_rows", pattern=irregular_pattern(30, 40, seed=5), lse_grad=True, sinks=True),
    *_feature_cases(),
)

_LARGE = AttentionCase("large", patterns.tidar_training(1000, 16), 2, 32, 8, 128, torch.bfloat16)
ATTENTION_CASES_LARGE: tuple[AttentionCase, ...] = (
    _LARGE,
    replace(_LARGE, name="large_fp16", dtype=torch.float16),
    replace(_LARGE, name="large_fp32", batch=1, num_heads=4, num_kv_heads=2, dtype=torch.float32),
    replace(_LARGE, name="large_d64", head_dim=64, num_heads=16, num_kv_heads=16),
    replace(_LARGE, name="large_d64_fp32", head_dim=64, num_heads=4, num_kv_heads=1, dtype=torch.float32),
    replace(_LARGE, name="large_d80", head_dim=80, num_heads=8),
    replace(_LARGE, name="large_d96", head_dim=96, num_heads=8),
    replace(_LARGE, name="large_d256", head_dim=256, num_heads=8, num_kv_heads=1),
    replace(_LARGE, name="large_d512", head_dim=512, num_heads=8, num_kv_heads=1),
    replace(_LARGE, name="large_d32", head_dim=32, num_heads=8),
    replace(_LARGE, name="group_7", num_heads=28, num_kv_heads=4, batch=1),
    replace(_LARGE, name="aligned", pattern=patterns.tidar_training(2048, 16), batch=1),
    replace(_LARGE, name="documents", pattern=_documents(1500, 8), batch=1),
    replace(_LARGE, name="block_diffusion_B512", pattern=patterns.block_diffusion_training(1500, 512), batch=1),
    replace(_LARGE, name="dflash", pattern=patterns.dflash_training(1500, list(range(0, 1500, 100)), 16), batch=1),
    replace(_LARGE, name="irregular", pattern=irregular_pattern(1100, 900), batch=1),
    replace(_LARGE, name="gaps", pattern=patterns.tidar_training(333, 8), layout="gaps"),
    replace(_LARGE, name="strided_heads", pattern=patterns.tidar_training(333, 8), layout="bhdn"),
    replace(_LARGE, name="lse_grad", pattern=patterns.tidar_training(333, 8), lse_grad=True),
    replace(_LARGE, name="large_softcap", softcap=50.0, scale=1.0),
    replace(_LARGE, name="large_softcap_fp32", num_heads=4, dtype=torch.float32, softcap=50.0, scale=1.0, batch=1),
    replace(_LARGE, name="gemma", head_dim=256, num_heads=8, num_kv_heads=4, softcap=50.0, batch=1),
    replace(
        _LARGE, name="large_d64_sinks", head_dim=64, num_heads=64, pattern=patterns.tidar_training(333, 8), sinks=True
    ),
    replace(_LARGE, name="window", pattern=patterns.tidar_training(1500, 16).windowed(256), batch=1),
)


@dataclass(frozen=True)
class AttentionOperands:
    """Operands and incoming gradients of one case, each between guard bands; `grad_lse` is 0 where lse is -inf.

    `sinks` are None for a case without.
    """

    q: Guarded
    k: Guarded
    v: Guarded
    grad_out: Guarded
    grad_lse: Guarded
    sinks: Guarded | None = None


def attention_operands(case: AttentionCase, device: torch.device | str = "cpu") -> AttentionOperands:
    """Fresh random operands of a case: the same on every device."""
    draw = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))

    def place(heads: int, rows: int, layout: str) -> Guarded:
        values = torch.randn(case.batch, heads, rows, case.head_dim, generator=draw, dtype=torch.float64, device="cpu")
        return guarded(values.to(case.dtype).to(device), layout)

    row_layout = "bnhd" if case.layout == "shared_heads" else case.layout
    rows, keys = case.pattern.q_len, case.pattern.kv_len
    q, k, v, grad_out = (
        place(case.num_heads, rows, row_layout),
        place(case.num_kv_heads, keys, case.layout),
        place(case.num_kv_heads, keys, case.layout),
        place(case.num_heads, rows, row_layout),
    )
    lse_dtype = torch.promote_types(case.dtype, torch.float32)
    shape = case.batch, case.num_heads, rows
    grad_lse = torch.randn(shape, generator=draw, dtype=torch.float64, device="cpu").to(lse_dtype)
    if not case.sinks:
        grad_lse *= case.pattern.dense().any(1)
    sinks = torch.randn(case.num_heads, generator=draw, device="cpu").to(device, case.dtype) if case.sinks else None
    return AttentionOperands(q, k, v, grad_out, guarded(grad_lse.to(device)), None if sinks is None else guarded(sinks))


_NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def _forward_backward(
    case: AttentionCase, tensors: list[Tensor], attend: Callable[..., tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """`[out, lse, dq, dk, dv(, dsinks)]` of `attend(q, k, v(, sinks)) -> (out, lse)`.

    The tensors are those of `AttentionOperands`.
    """
    q, k, v, grad_out, grad_lse, *sinks = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *sinks)]
    out, lse = attend(*leaves)
    outputs, grads = ([out, lse], [grad_out, grad_lse]) if case.lse_grad else ([out], [grad_out])
    return [out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads)]


def _run(case: AttentionCase, operands: AttentionOperands, backend: ops.Backend | None) -> list[Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, lse = ops.attention(
            *(q, k, v, case.pattern, case.scale), softcap=case.softcap, sinks=sinks, return_lse=True, backend=backend
        )
        return out, lse

    tensors = [memory.tensor for memory in vars(operands).values() if memory is not None]
    with poisoned_allocations():
        return _forward_backward(case, tensors, attend)


def _terms_of_dsinks(case: AttentionCase, operands: AttentionOperands, out: Tensor, lse: Tensor) -> float:
    """The norm of what the rows contribute to the gradient of sinks, by that of their sums; 0 without sinks."""
    if operands.sinks is None:
        return 0.0
    delta = (operands.grad_out.tensor.double() * out).sum(-1)
    if case.lse_grad:
        delta -= operands.grad_lse.tensor
    terms = (operands.sinks.tensor.double()[:, None] - lse).exp() * delta
    return float(terms.norm() / terms.sum((0, 2)).norm())


def check_attention(
    case: AttentionCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """`attention` against its eager twin in float64 by the budget rule: out, its worst row, lse, dq, dk, dv, dsinks.

    Also: rows that see no key are exactly 0 and so is their dq, and dk and dv of keys that no row sees; everything
    else is finite; nothing is written but the results, which have the layout of q, k and v.

    Raises:
        ParityError: any of it fails.
    """
    check_case(case, AttentionCase, device)
    operands = attention_operands(case, device)
    try:
        names = _NAMES if case.sinks else _NAMES[:-1]
        found = dict(zip(names, _run(case, operands, backend), strict=True))
        for name, memory in vars(operands).items():
            if memory is not None:
                memory.check(name)

        def twin(dtype: torch.dtype) -> list[Tensor]:
            def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
                return eager.attention(
                    *(q, k, v, case.pattern, case.scale), softcap=case.softcap, sinks=sinks, return_lse=True
                )

            cast = [memory.tensor.to(dtype) for memory in (operands.q, operands.k, operands.v, operands.grad_out)]
            lse_dtype = torch.promote_types(dtype, torch.float32)
            sinks = [] if operands.sinks is None else [operands.sinks.tensor.to(dtype)]
            return _forward_backward(case, [*cast, operands.grad_lse.tensor.to(lse_dtype), *sinks], attend)

        measures: list[Measure] = []
        reference = twin(torch.float64)
        terms = _terms_of_dsinks(case, operands, *reference[:2])
        for name, exact, plain in zip(names, reference, twin(case.dtype), strict=True):
            expected = torch.promote_types(case.dtype, torch.float32) if name == "lse" else case.dtype
            if found[name].dtype != expected:
                raise ParityError(f"{name}: expected dtype {expected}, got {found[name].dtype}")
            # A number a head, so that one error says little: at least what the relative error of dq makes of its terms.
            like_dq = terms * measures[names.index("dq") + 1].eager_error if name == "dsinks" else 0.0
            measures.append(budget(found[name], exact, plain, name, at_least=like_dq))
            if name == "out":
                measures.append(budget(found[name], exact, plain, "worst row of out", by_row=True))
        seen = case.pattern.dense().to(device)
        for name, blind in (("out", ~seen.any(1)), ("dq", ~seen.any(1)), ("dk", ~seen.any(0)), ("dv", ~seen.any(0))):
            rows = found[name][:, :, blind]
            check_equal(rows, torch.zeros_like(rows), f"{name} where nothing is seen")
    except ParityError as error:
        raise ParityError(f"attention, case {case.id} on {device}: {error}") from error
    return ParityResult("attention", case.id, str(device), str(case.dtype).removeprefix("torch."), tuple(measures))


def check_attention_repeats(
    case: AttentionCase, device: torch.device | str = "cpu", backend: ops.Backend | None = None
) -> ParityResult:
    """Two runs on the same operands give the same bits: out, lse and all gradients.

    Raises:
        ParityError: a bit differs.
    """
    check_case(case, AttentionCase, device)
    operands = attention_operands(case, device)
    runs = [_run(case, operands, backend) for _ in range(2)]
    for name, first, second in zip(_NAMES, *runs, strict=False):
        check_equal(second, first, f"attention, case {case.id} on {device}: {name} of a second run")
    return ParityResult("attention_repeats", case.id, str(device), str(case.dtype).removeprefix("torch."))
