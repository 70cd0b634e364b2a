"""Sampling and verification: which drafts of a step stay, and what comes next. On the device, without reading it.

The step rule (TiDAR, arXiv 2511.08923) is one operator, `verify`, with three ways to decide about a draft:

    coupled      target and draft are the argmax of their own scores plus the same noise; a draft stays if they agree.
                 The output is what autoregressive sampling gives with that seed, token for token. Greedy is its case
                 without noise.
    rejection    a draft d drawn from q stays with probability min(1, p(d) / q(d)); what replaces it is drawn from
                 norm(max(p - q, 0)). The output has the law of autoregressive sampling.
    point_mass   rejection for drafts that were an argmax: q is 1 at d.

All noise is a function of (seed, position, token) alone (`tidar_kernels.noise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import _checks, eager, ops
from .noise import Stream

__all__ = ["Rule", "SamplingParams", "SamplingTensors", "Verified", "sample", "sampling_tensors", "verify"]

Rule = Literal["coupled", "rejection", "point_mass"]
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class SamplingParams:
    """How one request samples. Tokens tied at an edge of top-k, top-p or min-p stay.

    Args:
        temperature: 0, which takes the argmax, ties to the lowest id; or 1e-4 .. 1e4.
        top_k: keep the k largest logits; 0 keeps all.
        top_p: then keep the fewest tokens with at least this share of the mass, in (0, 1].
        min_p: then keep tokens with at least this share of the largest probability, in [0, 1].
        repetition_penalty: divides positive logits of tokens that the request has seen, multiplies negative ones;
            1e-4 .. 1e4.
        seed: of the request's noise, any 64-bit int.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        for name, good, expected in (
            # Beyond these, scores would leave float32.
            ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e4, "0, or a number in [1e-4, 1e4]"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("top_p", 0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "a number in [0, 1]"),
            ("repetition_penalty", 1e-4 <= self.repetition_penalty <= 1e4, "a number in [1e-4, 1e4]"),
            ("seed", -(2**63) <= self.seed < 2**64, "a 64-bit int"),
        ):
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


class SamplingTensors(NamedTuple):
    """The parameters of a batch on its device: `knobs` float32 `[batch, 5]`, `seeds` int64 `[batch]`."""

    knobs: Tensor
    seeds: Tensor


def sampling_tensors(params: Sequence[SamplingParams], device: torch.device | str) -> SamplingTensors:
    """`params`, one for each sequence, as the operators take them."""
    # No vocabulary has 2^24 tokens, and float32 counts no further.
    knobs = [[p.temperature, min(p.top_k, 2**24), p.top_p, p.min_p, p.repetition_penalty] for p in params]
    seeds = [p.seed - 2**64 if p.seed >= 2**63 else p.seed for p in params]
    return SamplingTensors(
        torch.tensor(knobs, dtype=torch.float32, device=device), torch.tensor(seeds, dtype=torch.int64, device=device)
    )


class Verified(NamedTuple):
    """What a step accepted, on its device.

    Attributes:
        accepted: int64 `[batch]`, drafts that stay, 1..B.
        next_tokens: int64 `[batch]`, what follows them: slot 0 of the next draft; -1 behind a bad row.
        bad_rows: int64 `[batch]`, the row whose logits no token can be taken of (NaN, +inf, or nothing above -inf) and
            that the step came to; -1 if there is none.
    """

    accepted: Tensor
    next_tokens: Tensor
    bad_rows: Tensor


ops._library.define(
    "verify(Tensor logits, Tensor drafts, Tensor positions, Tensor knobs, Tensor seeds, Tensor? seen, "
    "Tensor? draft_logits, Tensor? mix, float beta, int rule) -> (Tensor, Tensor, Tensor)"
)
ops._library.define(
    "sample(Tensor logits, Tensor positions, Tensor knobs, Tensor seeds, Tensor? seen, int stream) -> Tensor"
)


def _check_rows(
    logits: Any, positions: Any, params: Any, seen: Any, others: dict[str, Any]
) -> tuple[Tensor, SamplingTensors]:
    """Check what both operators take; returns `(positions, parameters)`."""
    _checks.tensor("logits", logits, 3)
    present = {name: x for name, x in others.items() if x is not None}
    for name, x in present.items():
        _checks.tensor(name, x, 3)
        _checks.shape(name, x, tuple(logits.shape))
    _checks.same_kind(logits, **present)
    batch, rows, vocab_size = logits.shape
    if rows < 1 or vocab_size < 1:
        raise ValueError(f"logits: expected at least one row and one token, got shape {list(logits.shape)}")
    if isinstance(params, SamplingParams):
        params = [params] * batch
    if not isinstance(params, SamplingTensors):
        if len(params) != batch:
            raise ValueError(f"params: expected one for each of {batch} sequences, got {len(params)}")
        params = sampling_tensors(params, logits.device)
    _checks.shape("params.knobs", params.knobs, (batch, 5))
    positions = torch.as_tensor(positions, device=logits.device)
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")
    _checks.shape("positions", positions, (batch,))
    if seen is not None:
        _checks.tensor("seen", seen, 2)
        _checks.shape("seen", seen, (batch, vocab_size))
        if seen.dtype != torch.bool:
            raise TypeError(f"seen: expected dtype bool, got {seen.dtype}")
    return positions, params


def sample(
    logits: Tensor,
    positions: Tensor,
    params: SamplingParams | Sequence[SamplingParams] | SamplingTensors,
    *,
    seen: Tensor | None = None,
    stream: Stream = Stream.TOKEN,
    backend: ops.Backend | None = None,
) -> Tensor:
    """A token of every row: `argmax(scores + noise)`, which is a sample of the rows' softmax; or the plain argmax.

    Args:
        logits: `[batch, rows, vocab]`, any float dtype, any strides.
        positions: int `[batch]`, the position of the token of each sequence's row 0; row i is for the i-th behind it.
        params: of every sequence, or one for all.
        seen: bool `[batch, vocab]`, tokens that the repetition penalty is for; None for no penalty.
        stream: which noise; drafts that rejection will judge need a stream of their own.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        int64 `[batch, rows]`; -1 where no token can be taken of a row (NaN, +inf, or nothing above -inf).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.

    Twin: `tidar_kernels.eager.sample`. Kernel: `tidar_kernels.kernels.verify`.
    """
    positions, (knobs, seeds) = _check_rows(logits, positions, params, seen, {})
    ops._check_backend(backend, logits.device)
    if backend == "eager":
        return eager.sample(logits, positions, knobs, seeds, seen=seen, stream=stream)
    tokens: Tensor = torch.ops.tidar_kernels.sample(logits, positions, knobs, seeds, seen, int(stream))
    return tokens


def verify(
    logits: Tensor,
    drafts: Tensor,
    positions: Tensor,
    params: SamplingParams | Sequence[SamplingParams] | SamplingTensors,
    *,
    rule: Rule = "coupled",
    draft_logits: Tensor | None = None,
    mix: Tensor | None = None,
    beta: float = 1.0,
    seen: Tensor | None = None,
    check: bool = True,
    backend: ops.Backend | None = None,
) -> Verified:
    """How many drafts of a step stay, and the token behind them (TiDAR, arXiv 2511.08923, step rule).

    The first draft was the model's own choice a step ago and always stays. Draft i stays if all before it do and row
    i - 1, which has seen them, accepts it by the rule; the first row that does not, or the last, gives the next token.

    Args:
        logits: `[batch, B, vocab]`, the autoregressive logits of the B draft rows, any float dtype, any strides.
        drafts: int64 `[batch, B]`; -1 behind the first for a draft that is missing, where acceptance ends.
        positions: int `[batch]`, the position that row 0's token would take, one behind the first draft's.
        params: of every sequence, or one for all. At temperature 0 every rule is greedy.
        rule: "coupled", "rejection" or "point_mass"; see the module.
        draft_logits: `[batch, B, vocab]`, for "rejection": row i is what draft i was drawn from, by the same `params`;
            row 0 is not used.
        mix: `[batch, B, vocab]`, row i the diffusion logits of row 0 of the block behind draft i: rows then go by
            `beta * logits + (1 - beta) * mix`.
        beta: trust in the autoregressive logits, in [0, 1].
        seen: bool `[batch, vocab]`, tokens committed so far, for the repetition penalty; None for no penalty. Each row
            adds the drafts up to its own; what drafts were drawn from did not.
        check: raise for bad logits; reads the device. Without it, see `Verified.bad_rows`.
        backend: None picks by device; "triton" or "eager" by name.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, the rule, `beta`; with `check`, logits of a row that decides are
            NaN or +inf, or all -inf; the message names sequence and row.

    Twin: `tidar_kernels.eager.verify`. Kernel: `tidar_kernels.kernels.verify`.
    """
    positions, (knobs, seeds) = _check_rows(logits, positions, params, seen, {"draft_logits": draft_logits, "mix": mix})
    _checks.tensor("drafts", drafts, 2)
    _checks.shape("drafts", drafts, tuple(logits.shape[:2]))
    if drafts.dtype != torch.int64 or drafts.device != logits.device:
        raise TypeError(f"drafts: expected int64 on {logits.device}, got {drafts.dtype} on {drafts.device}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if (draft_logits is None) == (rule == "rejection"):
        got = "none" if draft_logits is None else "some"
        raise ValueError(f'draft_logits: expected for rule "rejection" and no other, got {got} for {rule!r}')
    if not 0.0 <= beta <= 1.0 or (mix is None and beta != 1.0):
        raise ValueError(f"beta: expected a number in [0, 1], and 1 without mix, got {beta}")
    ops._check_backend(backend, logits.device)
    if backend == "eager":
        verified = Verified(*eager.verify(
            logits, drafts, positions, knobs, seeds,
            rule=rule, draft_logits=draft_logits, mix=mix, beta=beta, seen=seen,
        ))  # fmt: skip
    else:
        verified = Verified(*torch.ops.tidar_kernels.verify(
            logits, drafts, positions, knobs, seeds, seen, draft_logits, mix, beta, RULES.index(rule)
        ))  # fmt: skip
    if check:
        for sequence, row in enumerate(verified.bad_rows.tolist()):
            if row >= 0:
                found = f"NaN, inf or nothing above -inf in sequence {sequence}, row {row}"
                raise ValueError(f"logits: expected finite numbers, got {found}")
    return verified


def _verify_triton(
    logits: Tensor, drafts: Tensor, positions: Tensor, knobs: Tensor, seeds: Tensor, seen: Tensor | None,
    draft_logits: Tensor | None, mix: Tensor | None, beta: float, rule: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .kernels.verify import verify as launch

    return launch(logits, drafts, positions, knobs, seeds, seen, draft_logits, mix, beta, rule, int(Stream.TOKEN))


def _verify_cpu(
    logits: Tensor, drafts: Tensor, positions: Tensor, knobs: Tensor, seeds: Tensor, seen: Tensor | None,
    draft_logits: Tensor | None, mix: Tensor | None, beta: float, rule: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if ops.interpreting():
        return _verify_triton(logits, drafts, positions, knobs, seeds, seen, draft_logits, mix, beta, rule)
    return eager.verify(
        logits, drafts, positions, knobs, seeds,
        rule=RULES[rule], draft_logits=draft_logits, mix=mix, beta=beta, seen=seen,
    )  # fmt: skip


def _verify_fake(
    logits: Tensor, drafts: Tensor, positions: Tensor, knobs: Tensor, seeds: Tensor, seen: Tensor | None,
    draft_logits: Tensor | None, mix: Tensor | None, beta: float, rule: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    accepted, next_tokens, bad_rows = (drafts.new_empty(drafts.shape[:1]) for _ in range(3))
    return accepted, next_tokens, bad_rows


def _sample_triton(
    logits: Tensor, positions: Tensor, knobs: Tensor, seeds: Tensor, seen: Tensor | None, stream: int
) -> Tensor:
    from .kernels.verify import sample as launch

    return launch(logits, positions, knobs, seeds, seen, stream)


def _sample_cpu(
    logits: Tensor, positions: Tensor, knobs: Tensor, seeds: Tensor, seen: Tensor | None, stream: int
) -> Tensor:
    if ops.interpreting():
        return _sample_triton(logits, positions, knobs, seeds, seen, stream)
    return eager.sample(logits, positions, knobs, seeds, seen=seen, stream=Stream(stream))


def _sample_fake(
    logits: Tensor, positions: Tensor, knobs: Tensor, seeds: Tensor, seen: Tensor | None, stream: int
) -> Tensor:
    return logits.new_empty(logits.shape[:2], dtype=torch.int64)


ops._library.impl("verify", _verify_cpu, "CPU")
ops._library.impl("verify", _verify_triton, "CUDA")
ops._library.impl("sample", _sample_cpu, "CPU")
ops._library.impl("sample", _sample_triton, "CUDA")
torch.library.register_fake("tidar_kernels::verify", _verify_fake, lib=ops._library)
torch.library.register_fake("tidar_kernels::sample", _sample_fake, lib=ops._library)
