"""What is compiled without a GPU: every kernel that ships, in every configuration that a chip has for it.

Operands have no memory: compiling asks for dtypes, strides, and which integers are 1 or divisible by 16.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tidar_kernels import patterns, testing
from tidar_kernels.ops._triton import configs
from tidar_kernels.ops._triton.launch import Launch
from tidar_kernels.ops._triton.linear_tables import ROLES, LinearConfig
from tidar_kernels.ops._triton.tables import FOLDING
from tidar_kernels.ops.attention import triton_backward as attention_backward
from tidar_kernels.ops.attention import triton_forward as attention_forward
from tidar_kernels.ops.kv.operands import Turned
from tidar_kernels.ops.kv.triton import plan_append_kv, plan_compact_kv, plan_rotary_append
from tidar_kernels.ops.linear import triton as linear
from tidar_kernels.ops.linear.operands import Adapter, Projection
from tidar_kernels.ops.operands import Cached, Keys, Results, Rows, Scores
from tidar_kernels.ops.step_attention import triton as step_attention
from tidar_kernels.ops.step_attention.api import rows_of
from tidar_kernels.ops.verify import Knob
from tidar_kernels.ops.verify import triton as verify
from tidar_kernels.ops.verify.operands import Drafted, Requests, Target

ROWS, HIDDEN, WIDE, RANK = 72, 1536, 12288, 64  # of projections: B = 8 of a step, and shapes of Qwen models
VOCABULARY = 151_936
SOFTCAP = 50.0
# A kernel whose tiles are in the tables, and its table.
TABLE_OF = {"step_attention": "step", "attention_forward": "forward", "attention_dq": "dq", "attention_dkdv": "dkdv"}
# The small kernels around them have one shape for all chips.
_ROWS_KERNELS = ("sound_keys", "combine_splits", "attention_rows", "append_kv", "rotary_append", "compact_kv")
_LISTS = ("row_tile_bounds", "list_row_runs")
# The kernels of verification, and the rules by which they differ.
_VERIFY = {
    **dict.fromkeys(("scan_chunks", "count_chunks", "gather_chunks"), ("coupled", "coupled extras")),
    "select_rows": ("coupled",),
    "race_chunks": ("coupled", "rejection", "point_mass", "coupled extras", "rejection extras"),
    "decide": ("coupled", "rejection", "sample"),
}
# How what the step kernel reads lies in memory, and the chips that this is compiled for: one of each family.
STORED = {
    "pages of 16": testing.CacheKind(16, "packed_nhd"),
    "pages of 64": testing.CacheKind(64, "hnd"),
    "float8 pages": testing.CacheKind(16, "packed_nhd", torch.float8_e4m3fn, "head"),
    "ragged": testing.CacheKind(),
    "ragged pages": testing.CacheKind(16, "packed_nhd"),
}
_STORED_CHIPS = (80, 90, 100)
# Head dims of keys and of values at which some of these are compiled for every chip.
_STORED_DIMS = ((72, 72), (80, 80), (192, 128), (256, 256))
_STORED_EVERYWHERE = ("pages of 16", "float8 pages", "ragged")
_VALUES = ", values of "  # in a variant, before the head dim of values that is not that of keys
# How many programs share the splits of a row tile where it is not one a split, and head dims that this is compiled for.
SHARES = {"two programs": 2, "one program": 1, "one program, ragged pages": 1}
_SHARE_DIMS = (64, 128)
_RULES = {"coupled": verify.COUPLED, "rejection": verify.REJECTION, "point_mass": verify.POINT_MASS}


@dataclass(frozen=True, order=True)
class Case:
    """One kernel in one configuration on one chip.

    Args:
        kernel: the kernel function's name without "_kernel".
        chip: as text, so that cases sort: "90", "gfx942".
        dtype: "bfloat16" or "float32".
        head_dim: 0 where there is none.
        variant: one of `configs.KINDS`, where a tree has a cap, sinks and a window too; "one split", "tree alone", how
            rows and cache lie in memory (`STORED`) and how wide values are if not as keys, who has which splits
            (`SHARES`), the role of a projection, or the rule of verification.
    """

    kernel: str
    chip: str
    dtype: str
    head_dim: int = 0
    variant: str = ""

    @property
    def target(self) -> configs.Chip:
        """The chip as the tables and the compiler know it."""
        return int(self.chip) if self.chip.isdigit() else self.chip

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def stored(self) -> str:
        """The variant without the width of values."""
        return self.variant.partition(_VALUES)[0]

    @property
    def head_dim_v(self) -> int:
        """The head dim of values."""
        return int(self.variant.partition(_VALUES)[2] or self.head_dim)

    def __str__(self) -> str:
        parts = (self.kernel, self.chip, self.dtype, f"d{self.head_dim}" if self.head_dim else "", self.variant)
        return " ".join(part for part in parts if part)


def cases(chip: configs.Chip) -> list[Case]:
    """Every kernel and configuration on one chip."""
    found = []
    for kernel, dtype, kind in itertools.product(TABLE_OF, ("bfloat16", "float32"), configs.KINDS):
        if kernel == "step_attention" or kind != configs.TREE:
            table = configs.entries(TABLE_OF[kernel], chip, dtype == "float32", kind)
            found += [Case(kernel, str(chip), dtype, head_dim, kind) for head_dim in table]
    found += [Case("step_attention", str(chip), "bfloat16", 128, variant) for variant in ("one split", "tree alone")]
    for head_dim, variant in itertools.product((64, 128), STORED if chip in _STORED_CHIPS else ()):
        found.append(Case("step_attention", str(chip), "bfloat16", head_dim, variant))
    for (head_dim, head_dim_v), stored in itertools.product(_STORED_DIMS, _STORED_EVERYWHERE):
        variant = stored if head_dim_v == head_dim else f"{stored}{_VALUES}{head_dim_v}"
        found.append(Case("step_attention", str(chip), "bfloat16", head_dim, variant))
    for head_dim, variant in itertools.product(_SHARE_DIMS, SHARES if chip in FOLDING else ()):
        if chip in _STORED_CHIPS or not variant.endswith("pages"):
            found.append(Case("step_attention", str(chip), "bfloat16", head_dim, variant))
    found += [Case("combine_splits", str(chip), "bfloat16", 128, "extras")]
    found += [Case("combine_splits", str(chip), "bfloat16", 128, "ragged")] * (chip in _STORED_CHIPS)
    small = itertools.product(_ROWS_KERNELS, ("bfloat16", "float32"), (64, 128, 256, 512))
    found += [
        Case(kernel, str(chip), dtype, head_dim)
        for kernel, dtype, head_dim in small
        if kernel != "attention_rows" or head_dim in configs.entries("dq", chip, dtype == "float32")
    ]
    found += [Case(kernel, str(chip), "bfloat16", 128) for kernel in _LISTS]
    for kernel, variants in _VERIFY.items():
        found += [Case(kernel, str(chip), "bfloat16", variant=variant) for variant in variants]
    for dtype, role in itertools.product(("bfloat16", "float32"), ROLES):
        found.append(Case(kernel_of(role), str(chip), dtype, variant=role))
    return sorted(found)


def some_of(known: Iterable[Any]) -> Callable[[str], list[str]]:
    """An argument of a command line: some of the known names, separated by commas."""
    names = list(map(str, known))

    def read(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(names)}, got {','.join(unknown)}")
        return text.split(",")

    return read


def kernel_of(role: str) -> str:
    """The kernel that runs a projection's role."""
    return "linear" if role in ("wide", "narrow") else "gated_sum" if role == "sum" else "gated_rows"


Config = configs.TileConfig | LinearConfig


def launch(case: Case, config: Config | None = None) -> Launch:
    """The launch of a case, without memory, with a configuration of its own instead of the table's if one is given.

    Raises:
        ValueError: the case has no launch of that kernel.
    """
    return wanted(case, launches(case, config))


def launches(case: Case, config: Config | None = None, device: torch.device | str = "meta") -> list[Launch]:
    """The launches of the operator that the kernel of `case` belongs to, in order; random operands but on "meta"."""
    with nullcontext() if config is None else configured(case, config):
        return _PLANS[case.kernel](case, torch.device(device))


def wanted(case: Case, planned: list[Launch]) -> Launch:
    """The launch of the kernel of `case`.

    Raises:
        ValueError: there is none.
    """
    for one in planned:
        if one.kernel.__name__ == f"{case.kernel}_kernel":
            return one
    raise ValueError(f"case: expected a launch of {case.kernel}, got {[x.kernel.__name__ for x in planned]}")


@contextmanager
def configured(case: Case, config: Config) -> Iterator[None]:
    """Within it the kernel of `case` is planned with `config`; the others keep their tables'."""

    def attention_config(kernel: str, *rest: Any) -> Any:
        return config if kernel == TABLE_OF.get(case.kernel) else configs.attention_config(kernel, *rest)

    with ExitStack() as stack:
        for module in (attention_forward, attention_backward):
            stack.enter_context(mock.patch.object(module, "attention_config", attention_config))
        stack.enter_context(mock.patch.object(step_attention, "step_config", partial(attention_config, "step")))
        if case.variant in ROLES:
            stack.enter_context(mock.patch.object(linear, "linear_config", return_value=config))
        yield


def _operand(device: torch.device, *shape: int, dtype: torch.dtype, layout: str = "") -> Tensor:
    """Random floats, zero integers; without memory on "meta". `layout` as in `testing.LAYOUTS`, of four dimensions."""
    strides = testing.LAYOUTS[layout](*shape) if layout else torch.empty(shape, device="meta").stride()
    made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    if device.type != "meta":
        _ = made.normal_() if dtype.is_floating_point else made.zero_()
    return made


def _step(case: Case, device: torch.device) -> list[Launch]:
    """32 query heads of 8 kv heads, three sequences, B = 8; 8192 slots make several splits, 256 make one."""
    slots = 256 if case.variant == "one split" else 8192
    extras = case.variant in (configs.EXTRAS, configs.TREE)
    pattern = patterns.tidar_step(8)
    if case.variant in (configs.TREE, "tree alone"):
        pattern = testing.random_tree(pattern.q_len)
    if extras:
        pattern = pattern.windowed(1024)
    operand = partial(_operand, device, dtype=case.torch_dtype)
    batch: patterns.Pattern | patterns.PatternBatch = pattern
    shape, lies = (3, pattern.q_len), case.stored.removeprefix("one program, ")
    if lies.startswith("ragged"):
        batch, shape = patterns.batch([pattern] * 3).to(device), (1, 3 * pattern.q_len)
    widths = ((32, case.head_dim), (8, case.head_dim), (8, case.head_dim_v))
    q, k, v = (operand(shape[0], heads, shape[1], width, layout="bnhd") for heads, width in widths)
    lengths = torch.full((3,), slots - pattern.q_len, dtype=torch.int32, device=device)
    scores = Scores(case.head_dim**-0.5, *((SOFTCAP, operand(32)) if extras else ()))
    rows, cached = rows_of(q, batch), _cached(case, STORED.get(lies), slots, lengths)
    programs = lambda *arguments: SHARES.get(case.variant, arguments[-1])  # noqa: E731
    with mock.patch.object(step_attention, "programs_of_a_tile", programs):
        return step_attention.plan_step_attention(rows, Keys(k, v), cached, scores, case.target)[0]


def _cached(case: Case, kind: testing.CacheKind | None, slots: int, lengths: Tensor) -> Cached:
    """Caches of three sequences and 8 heads, stored as `kind` says: in pages with their table, with scales."""
    device, widths = lengths.device, (case.head_dim, case.head_dim_v)
    if kind is None or not kind.page_size:
        k_cache, v_cache = (_operand(device, 3, 8, slots, width, dtype=case.torch_dtype) for width in widths)
        return Cached(k_cache, v_cache, lengths, slots)
    columns, dtype = slots // kind.page_size, kind.dtype or case.torch_dtype
    caches = []
    for width in widths:
        shape = (3 * columns, 8, kind.page_size, width)
        strides, _ = testing.PAGED_LAYOUTS[kind.layout](*shape)
        caches.append(torch.empty_strided(shape, strides, dtype=dtype, device=device))
    k_scale = v_scale = None
    if kind.dtype is not None:
        k_scale, v_scale = (_operand(device, 3, 8, dtype=torch.float32) for _ in "kv")
    table = _operand(device, 3, columns, dtype=torch.int32)
    return Cached(caches[0], caches[1], lengths, slots, table, k_scale, v_scale)


@functools.cache
def _training_pattern() -> patterns.Pattern:
    return patterns.tidar_training(4096, 16)


def _attention(case: Case, device: torch.device) -> list[Launch]:
    """A forward and a backward pass over S = 4096 tokens, batch 2, 32 query heads of 8 kv heads."""
    pattern = _training_pattern()
    operand = partial(_operand, device, dtype=case.torch_dtype)
    q, grad = (operand(2, 32, pattern.q_len, case.head_dim, layout="bnhd") for _ in range(2))
    k, v = (operand(2, 8, pattern.q_len, case.head_dim, layout="bnhd") for _ in range(2))
    scores = Scores(case.head_dim**-0.5, *((SOFTCAP, operand(32)) if case.variant == configs.EXTRAS else ()))
    rows, keys = Rows(q, *pattern.rows_on(device)[:2]), Keys(k, v)
    forward, out, lse = attention_forward.plan_attention(rows, keys, scores, case.target)
    results = Results(out, lse, grad)
    if case.kernel == "attention_forward":  # there are chips on which no backward kernel takes what this one takes
        return forward
    backward, *_ = attention_backward.plan_attention_backward(rows, keys, scores, results, case.target)
    return [*forward, *backward]


def _caches(case: Case, device: torch.device) -> list[Launch]:
    """What writes into caches of 2 sequences, 8 kv heads: 72 rows appended, or rotated and 8 appended, or moved."""
    operand = partial(_operand, device, dtype=case.torch_dtype)
    new, cache, table = (operand(2, *shape, case.head_dim) for shape in ((8, ROWS), (8, 8192), (ROWS,)))
    rows, cached = Keys(new, new), Cached(cache, cache, _operand(device, 2, dtype=torch.int32))
    path, q = _operand(device, 2, 16, dtype=torch.int32), operand(2, 32, ROWS, case.head_dim)
    rotated = plan_rotary_append(Turned(q, table, table), rows, cached, 8)[0]
    return [plan_append_kv(cached, rows), plan_compact_kv(cached, path), rotated]


def _verify(case: Case, device: torch.device) -> list[Launch]:
    """One binary serves all vocabularies of 128k to 256k tokens. "extras": seen tokens (penalty) and mixed logits."""
    rule, _, extras = case.variant.partition(" ")
    logits = _operand(device, 2, 8, VOCABULARY, dtype=case.torch_dtype)
    integers = _operand(device, 2, dtype=torch.int64)
    drafted = None
    if rule != "sample":
        drafts = _operand(device, 2, 8, dtype=torch.int64)
        drafted = Drafted(drafts, logits if rule == "rejection" else None, _RULES.get(rule, verify.COUPLED))
    seen = _operand(device, 2, VOCABULARY, dtype=torch.bool) if extras else None
    requests = Requests(integers, _operand(device, 2, len(Knob), dtype=torch.float32), integers, seen)
    planned, _ = verify.plan_verify(Target(logits, logits if extras else None, 0.5), drafted, requests, 0)
    return planned


def _linear(case: Case, device: torch.device) -> list[Launch]:
    """Projections at shapes of Qwen2.5-1.5B and Qwen3-8B, by the role that chooses their tiles."""
    operand, chip, role = partial(_operand, device, dtype=case.torch_dtype), case.target, case.variant
    gate, x = _operand(device, ROWS, dtype=torch.float32), operand(ROWS, HIDDEN)
    if role in ("wide", "narrow"):
        width, rank = (WIDE, RANK) if role == "wide" else (HIDDEN, 8)
        adapter = Adapter(operand(rank, HIDDEN), operand(width, rank), gate, 0.5)
        projection = Projection(x, operand(width, HIDDEN), operand(HIDDEN) if role == "narrow" else None)
        return [linear.plan_linear(projection, chip, adapter, operand(ROWS, rank))[0]]
    if role == "down":
        return [linear.plan_gated_rows(role, x, operand(RANK, HIDDEN), gate, 1.0, chip)[0]]
    if role == "train_down":
        return [linear.plan_gated_rows(role, x, operand(HIDDEN, 256).t(), gate, 0.5, chip)[0]]
    h = operand(ROWS, RANK)
    if role == "add":
        return [linear.plan_gated_rows(role, h, operand(WIDE, RANK), gate, 0.5, chip, operand(ROWS, WIDE))[0]]
    return [linear.plan_gated_sum(h, x, gate, 1.0, chip)[0]]


_PLANS: dict[str, Callable[[Case, torch.device], list[Launch]]] = {
    **dict.fromkeys(("sound_keys", "step_attention", "combine_splits"), _step),
    **dict.fromkeys(("attention_forward", "attention_rows", "attention_dq", "attention_dkdv", *_LISTS), _attention),
    **dict.fromkeys(_VERIFY, _verify),
    **dict.fromkeys(("linear", "gated_rows", "gated_sum"), _linear),
    **dict.fromkeys(("append_kv", "compact_kv", "rotary_append"), _caches),
}
KERNELS = tuple(_PLANS)
