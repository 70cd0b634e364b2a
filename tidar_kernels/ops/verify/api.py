"""Sampling and verification: which drafts of a step stay, and what comes next. On the device, without reading it.

The step rule (TiDAR, arXiv 2511.08923) is one operator, `verify`, with three ways to decide about a draft:

    coupled      target and draft are the argmax of their own scores plus the same noise; a draft stays if they agree.
                 The output is what autoregressive sampling gives with that seed, token for token. Greedy is its case
                 without noise.
    rejection    a draft d drawn from q stays with probability min(1, p(d) / q(d)); what replaces it is drawn from
                 norm(max(p - q, 0)). The output has the law of autoregressive sampling.
    point_mass   rejection for drafts that were an argmax: q is 1 at d.

All noise is a function of (seed, position, token) alone (`tidar_kernels.ops.verify.noise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...patterns.arguments import check_instances, check_int, check_number
from .. import checks
from ..declaration import Backend, Operator, check_backend
from . import cpu, reference
from .noise import Stream
from .operands import RULES, Drafted, Requests, Rule, Target
from .params import Knob, SamplingParams, SamplingTensors, sampling_tensors

__all__ = ["RULES", "Rule", "Verified", "check_drafts", "check_rows", "sample", "verify"]


class Verified(NamedTuple):
    """What a step accepted, on its device.

    Attributes:
        accepted: int64 `[batch]`, drafts that stay, 1..B.
        next_tokens: int64 `[batch]`, what follows them: slot 0 of the next draft; -1 after a bad row.
        bad_rows: int64 `[batch]`, the row whose logits no token can be taken of (NaN, +inf, or nothing above -inf) and
            that the step came to; -1 if there is none.
    """

    accepted: Tensor
    next_tokens: Tensor
    bad_rows: Tensor


def check_rows(
    logits: Any, positions: Any, params: Any, seen: Any, others: dict[str, Any]
) -> tuple[Tensor, SamplingTensors]:
    """Check what both operators take; returns `(positions, parameters)`."""
    checks.tensor("logits", logits, 3)
    present = {name: x for name, x in others.items() if x is not None}
    for name, x in present.items():
        checks.tensor(name, x, 3)
        checks.shape(name, x, tuple(logits.shape))
    checks.same_kind(logits, **present)
    batch, rows, vocab_size = logits.shape
    if rows < 1 or vocab_size < 1:
        raise ValueError(f"logits: expected at least one row and one token, got shape {list(logits.shape)}")
    if isinstance(params, SamplingParams):
        params = [params] * batch
    if not isinstance(params, SamplingTensors):
        params = check_instances("params", params, SamplingParams)
        if len(params) != batch:
            raise ValueError(f"params: expected one for each of {batch} sequences, got {len(params)}")
        params = sampling_tensors(params, logits.device)
    for name, x, kind, expected in (
        ("knobs", params.knobs, torch.float32, (batch, len(Knob))),
        ("seeds", params.seeds, torch.int64, (batch,)),
    ):
        name = f"params.{name}"
        checks.tensor(name, x, len(expected))
        checks.shape(name, x, expected)
        if x.dtype != kind:
            raise TypeError(f"{name}: expected dtype {kind}, got {x.dtype}")
        _check_device(name, x, logits)
    try:
        positions = torch.as_tensor(positions, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:  # which of them depends on what it was
        raise TypeError(f"positions: expected an int tensor, got {type(positions).__name__}") from error
    checks.tensor("positions", positions, 1)
    if positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"positions: expected int32 or int64, got {positions.dtype}")
    checks.shape("positions", positions, (batch,))
    if seen is not None:
        checks.tensor("seen", seen, 2)
        checks.shape("seen", seen, (batch, vocab_size))
        if seen.dtype != torch.bool:
            raise TypeError(f"seen: expected dtype bool, got {seen.dtype}")
        _check_device("seen", seen, logits)
    return positions.contiguous(), SamplingTensors(params.knobs.contiguous(), params.seeds.contiguous())


def _check_device(name: str, value: Tensor, logits: Tensor) -> None:
    if value.device != logits.device:
        raise ValueError(f"{name}: expected device {logits.device} like the logits, got {value.device}")


def check_drafts(drafts: Any, logits: Tensor, rule: Any, draft_logits: Any, beta: Any, mix: Any) -> None:
    """Check what is decided about, beside the rows of logits, and how."""
    checks.tensor("drafts", drafts, 2)
    checks.shape("drafts", drafts, tuple(logits.shape[:2]))
    if drafts.dtype != torch.int64 or drafts.device != logits.device:
        raise TypeError(f"drafts: expected int64 on {logits.device}, got {drafts.dtype} on {drafts.device}")
    readable = drafts.device.type == "cpu" and type(drafts) is Tensor and not torch.compiler.is_compiling()
    if readable and drafts.numel() and int(drafts.max()) >= logits.shape[-1]:
        raise ValueError(f"drafts: expected tokens below {logits.shape[-1]}, got {int(drafts.max())}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if (draft_logits is None) == (rule == "rejection"):
        got = "none" if draft_logits is None else "some"
        raise ValueError(f'draft_logits: expected for rule "rejection" and no other, got {got} for {rule!r}')
    if check_number("beta", beta, 0.0, 1.0) != 1.0 and mix is None:
        raise ValueError(f"beta: expected a number in [0, 1], and 1 without mix, got {beta}")


def sample(
    logits: Tensor,
    positions: Tensor,
    params: SamplingParams | Sequence[SamplingParams] | SamplingTensors,
    *,
    seen: Tensor | None = None,
    stream: Stream = Stream.TOKEN,
    backend: Backend | None = None,
) -> Tensor:
    """A token of every row: `argmax(scores + noise)`, which is a sample of the rows' softmax; or the plain argmax.

    Args:
        logits: `[batch, rows, vocab]`, any float dtype, any strides.
        positions: int `[batch]`, the position of the token of each sequence's row 0; row i is for the i-th after it.
        params: of every sequence, or one for all.
        seen: bool `[batch, vocab]`, tokens that the repetition penalty is for; None for no penalty.
        stream: which noise; drafts that rejection will judge need a stream of their own.
        backend: None picks by device; "triton" or "eager" by name.

    Returns:
        int64 `[batch, rows]`; -1 where no token can be taken of a row (NaN, +inf, or nothing above -inf).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not fit.

    Twin: `tidar_kernels.eager.sample`. Kernel: `triton.py` beside this file.
    """
    positions, (knobs, seeds) = check_rows(logits, positions, params, seen, {})
    check_int("stream", stream, 0, 2**31)
    check_backend(backend, logits.device)
    if backend == "eager":
        return reference.sample(logits, positions, knobs, seeds, seen=seen, stream=stream)
    tokens: Tensor = sample_operator(Target(logits), Requests(positions, knobs, seeds, seen), stream=int(stream))
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
    backend: Backend | None = None,
) -> Verified:
    """How many drafts of a step stay, and the token after them (TiDAR, arXiv 2511.08923, step rule).

    The first draft was the model's own choice a step ago and always stays. Draft i stays if all before it do and row
    i - 1, which has seen them, accepts it by the rule; the first row that does not, or the last, gives the next token.

    Args:
        logits: `[batch, B, vocab]`, the autoregressive logits of the B draft rows, any float dtype, any strides.
        drafts: int64 `[batch, B]`; -1 after the first for a draft that is missing, where acceptance ends; so it does at
            one that is no token of the vocabulary, which the CPU refuses.
        positions: int `[batch]`, the position that row 0's token would take, one after the first draft's.
        params: of every sequence, or one for all. At temperature 0 every rule is greedy.
        rule: "coupled", "rejection" or "point_mass"; see the module.
        draft_logits: `[batch, B, vocab]`, for "rejection": row i is what draft i was drawn from, by the same `params`;
            row 0 is not used.
        mix: `[batch, B, vocab]`, row i the diffusion logits of row 0 of the block after draft i: rows then go by
            `beta * logits + (1 - beta) * mix`.
        beta: trust in the autoregressive logits, in [0, 1].
        seen: bool `[batch, vocab]`, tokens committed so far, for the repetition penalty; None for no penalty. Each row
            adds the drafts up to its own; what drafts were drawn from did not.
        check: raise for bad logits; reads the device. Without it, see `Verified.bad_rows`.
        backend: None picks by device; "triton" or "eager" by name.

    Raises:
        TypeError: dtypes. ValueError: shapes, devices, the rule, `beta`; with `check`, logits of a row that decides are
            NaN or +inf, or all -inf; the message names sequence and row.

    Twin: `tidar_kernels.eager.verify`. Kernel: `triton.py` beside this file.
    """
    positions, (knobs, seeds) = check_rows(logits, positions, params, seen, {"draft_logits": draft_logits, "mix": mix})
    check_drafts(drafts, logits, rule, draft_logits, beta, mix)
    check_backend(backend, logits.device)
    if backend == "eager":
        verified = Verified(*reference.verify(
            logits, drafts, positions, knobs, seeds,
            rule=rule, draft_logits=draft_logits, mix=mix, beta=beta, seen=seen,
        ))  # fmt: skip
    else:
        drafted = Drafted(drafts, draft_logits, RULES.index(rule))
        requests = Requests(positions, knobs, seeds, seen)
        verified = Verified(*verify_operator(Target(logits, mix, beta), drafted, requests))
    if check:
        for sequence, row in enumerate(verified.bad_rows.tolist()):
            if row >= 0:
                found = f"NaN, inf or nothing above -inf in sequence {sequence}, row {row}"
                raise ValueError(f"logits: expected finite numbers, got {found}")
    return verified


def _kernels() -> Any:
    from . import triton

    return triton


def _verify_cpu(target: Target, drafted: Drafted, requests: Requests) -> tuple[Tensor, Tensor, Tensor]:
    (logits, mix, beta), (drafts, draft_logits, rule) = target, drafted
    if logits.shape[-1] > cpu.SMALL:
        return cpu.verify(target, drafted, requests)
    if mix is None and cpu.is_greedy(requests):
        return cpu.verify_greedy(logits, drafts)
    *sampling, seen = requests
    options: dict[str, Any] = {"draft_logits": draft_logits, "mix": mix, "beta": beta, "seen": seen}
    return reference.verify(logits, drafts, *sampling, rule=RULES[rule], **options)


def _sample_cpu(target: Target, requests: Requests, stream: int) -> Tensor:
    if target.logits.shape[-1] > cpu.SMALL:
        return cpu.sample(target, requests, stream)
    if cpu.is_greedy(requests):
        return cpu.sample_greedy(target.logits)
    *sampling, seen = requests
    return reference.sample(target.logits, *sampling, seen=seen, stream=stream)


def _verify_fake(target: Target, drafted: Drafted, requests: Requests) -> tuple[Tensor, Tensor, Tensor]:
    accepted, next_tokens, bad_rows = (drafted.drafts.new_empty(drafted.drafts.shape[:1]) for _ in range(3))
    return accepted, next_tokens, bad_rows


def _sample_fake(target: Target, requests: Requests, stream: int) -> Tensor:
    return target.logits.new_empty(target.logits.shape[:2], dtype=torch.int64)


verify_operator = Operator(
    "verify(Tensor logits, Tensor drafts, Tensor positions, Tensor knobs, Tensor seeds, Tensor? seen, "
    "Tensor? draft_logits, Tensor? mix, float beta, int rule) -> (Tensor, Tensor, Tensor)",
    Target,
    Drafted,
    Requests,
    cpu=_verify_cpu,
    kernel=lambda: _kernels().verify,
    fake=_verify_fake,
)
sample_operator = Operator(
    "sample(Tensor logits, Tensor positions, Tensor knobs, Tensor seeds, Tensor? seen, int stream) -> Tensor",
    Target,
    Requests,
    cpu=_sample_cpu,
    kernel=lambda: _kernels().sample,
    fake=_sample_fake,
)
