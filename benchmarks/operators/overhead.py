"""What a call of an operator costs in Python, up to Triton's launcher: microseconds, without a GPU.

    python -m benchmarks.operators.overhead [--against DIR] [--rounds N] [--only NAME ..] [--json]

Operands are small and lie on the CPU, kernels are planned for one chip, and Triton's launcher does nothing: what is
left is checking arguments, dispatch, allocation, and planning launches. `--against DIR` measures the package of another
checkout too, their rounds taking turns, so that load on the machine meets both alike; `of_first` is the median of the
ratios of such pairs. Each checkout has its own process, which loads this file alone from the suite: it knows the layout
of older checkouts too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROGRAM = "python -m benchmarks.operators.overhead"
CHIP = 90
CALLS = 20  # a round
OPERATORS = ("step_attention", "rotary_append", "append_kv", "verify", "row_invariant_linear", "gated_lora")


def stub_launcher(launched: list[str]) -> None:
    """Have CPU tensors take the way of CUDA tensors, for good in this process; the launcher only adds to `launched`.

    Every module must be there already: what was imported by name is replaced where it is.
    """
    import triton.runtime.jit

    import tidar_kernels as tk

    for room in ("kernels", "ops"):  # kernels are imported when they first run: before anything is replaced
        if (Path(tk.__file__).parent / room / "__init__.py").is_file():
            package = importlib.import_module(f"tidar_kernels.{room}")
            for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                importlib.import_module(found.name)
    triton.runtime.jit.JITFunction.run = lambda self, *args, **options: launched.append(self.__name__)
    stubs: dict[str, Callable[..., Any]] = {"interpreting": lambda: True, "chip_of": lambda device: CHIP}
    for name, module in list(sys.modules.items()):
        for function, stub in stubs.items() if name.startswith("tidar_kernels") else ():
            if function in vars(module):
                setattr(module, function, stub)


def public(name: str) -> Callable[..., Any]:
    """An operator, where this checkout has it."""
    for place in ("tidar_kernels", "tidar_kernels.ops", "tidar_kernels.linear", "tidar_kernels.rotary"):
        if importlib.util.find_spec(place) and hasattr(importlib.import_module(place), name):
            found: Callable[..., Any] = getattr(importlib.import_module(place), name)
            return found
    raise AttributeError(f"{name}: expected an operator of {sys.modules['tidar_kernels'].__file__}, got none")


def calls() -> dict[str, Callable[[], Any]]:
    """A call of each operator on the operands of a small step of a model in bfloat16."""
    import tidar_kernels as tk

    batch, heads, kv_heads, dim, block, width, rank, vocabulary = 1, 4, 2, 64, 4, 64, 8, 512
    pattern = tk.patterns.tidar_step(block)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    q = random(batch, heads, pattern.q_len, dim)
    k, v = (random(batch, kv_heads, pattern.q_len, dim) for _ in "kv")
    k_cache, v_cache = (random(batch, kv_heads, 4096, dim) for _ in "kv")
    lengths = torch.full((batch,), 1000, dtype=torch.int32)
    rotary = tuple(random(batch, pattern.q_len, 1, dim) for _ in ("cos", "sin"))
    x, weight = random(pattern.q_len, width), random(width, width)
    lora_a, lora_b, gate = random(rank, width), random(width, rank), torch.ones(pattern.q_len)
    logits = torch.randn(batch, block, vocabulary)
    drafts = torch.zeros(batch, block, dtype=torch.int64)
    positions = torch.full((batch,), 1001)
    params = tk.SamplingParams(temperature=0.8)
    step_attention, rotary_append, append_kv, verify, linear, lora = map(public, OPERATORS)
    return {
        "step_attention": lambda: step_attention(q, k, v, k_cache, v_cache, lengths, pattern),
        "rotary_append": lambda: rotary_append(q, k, v, rotary, k_cache, v_cache, lengths, block),
        "append_kv": lambda: append_kv(k_cache, v_cache, k, v, lengths),
        "verify": lambda: verify(logits, drafts, positions, params, check=False),
        "row_invariant_linear": lambda: linear(x, weight),
        "gated_lora": lambda: lora(x, weight, lora_a, lora_b, gate),
    }


def work(only: list[str]) -> None:
    """For every operator on the standard input a round: microseconds a call, a line."""
    chosen = {name: call for name, call in calls().items() if name in only}
    launched: list[str] = []
    with torch.inference_mode():
        for call in chosen.values():
            call()  # on the CPU: the package imports what it needs when it is first used
        stub_launcher(launched)
        for name, call in chosen.items():
            call()
            if not launched:
                raise RuntimeError(f"{name}: expected a launch, got a call that ran on the CPU")
            launched.clear()
        for line in sys.stdin:
            call = chosen[line.strip()]
            call()
            launched.clear()
            print(timeit.timeit(call, number=CALLS) / CALLS * 1e6, flush=True)


def measure(checkouts: list[Path], only: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each operator and checkout: `p50_us`, `least_us`, and of all but the first what its calls take.

    Raises:
        RuntimeError: a checkout cannot be measured.
    """
    # Not as a script: its folder would be the first on the path.
    start = "import runpy, sys; runpy.run_path(sys.argv[1])['work'](sys.argv[2:])"
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", start, __file__, *only],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout,
            env=os.environ | settings | {"PYTHONPATH": str(checkout)},
        )
        for checkout in checkouts
    ]  # fmt: skip
    rows = []
    try:
        for name in only:
            taken = [[ask(worker, name) for worker in workers] for _ in range(rounds + 1)][1:]
            for index, checkout in enumerate(checkouts):
                mine = [each[index] for each in taken]
                row = {"operator": name, "checkout": str(checkout), "p50_us": round(statistics.median(mine), 2)}
                pairs = [each[index] / each[0] for each in taken]  # as the load of the machine changes
                of_first = {"of_first": round(statistics.median(pairs), 3)} if index else {}
                rows.append({**row, "least_us": round(min(mine), 2), **of_first})
    finally:
        for worker in workers:
            worker.communicate()
    return rows


def ask(worker: subprocess.Popen[str], name: str) -> float:
    """Microseconds of a call, the mean of a round."""
    answer = ""
    if worker.stdin and worker.stdout:
        with contextlib.suppress(BrokenPipeError):  # it ended before it was asked
            print(name, file=worker.stdin, flush=True)
            answer = worker.stdout.readline()
    if not answer:
        raise RuntimeError(f"{worker.args}: expected a checkout that can be measured, got none")  # type: ignore[str-bytes-safe]
    return float(answer)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of the package")
    parser.add_argument("--rounds", type=int, default=200, help=f"of {CALLS} calls each; default 200")
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=list(OPERATORS), metavar="NAME")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    options = parser.parse_args(arguments)
    here = Path(__file__).resolve().parents[2]
    checkouts = [here, *([options.against.resolve()] if options.against else [])]
    rows = measure(checkouts, options.only, options.rounds)
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        other = f"  {row['of_first']:5.2f} x  {row['checkout']}" if "of_first" in row else ""
        print(f"{row['operator']:22} {row['p50_us']:7.1f} us, least {row['least_us']:7.1f}{other}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
