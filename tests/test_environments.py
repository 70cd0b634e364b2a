"""Process-wide settings that users change: what is computed stays what it was, and nothing fails."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tidar_kernels as tk
from tests.toys import CONFIG, PROMPTS, sharp_model
from tidar_kernels import models, patterns, strategies
from tidar_kernels.models import Transformer

Setting = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic(fill: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        fill,
    )  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


@contextlib.contextmanager
def changed(set_value: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


@contextlib.contextmanager
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Within these, every result is the one of an ordinary process.
SAME: dict[str, Setting] = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "meta by default": lambda: torch.device("meta"),
    "deterministic algorithms": lambda: deterministic(True),
    "deterministic algorithms, memory not filled": lambda: deterministic(False),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "gradients on": torch.enable_grad,
    "anomaly detection": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "NumPy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": strict_warnings,
    "no collector": without_collector,
    "a limit on recursion": lambda: changed(sys.setrecursionlimit, 300, sys.getrecursionlimit()),
    "printing of tensors": lambda: changed(
        lambda sci: torch.set_printoptions(sci_mode=sci, threshold=1, precision=1), True, None
    ),
    "another random state": lambda: torch.random.fork_rng(),
    "TF32 allowed": lambda: changed(torch.set_float32_matmul_precision, "high", torch.get_float32_matmul_precision()),
    "math attention alone": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
    "a saved-tensor hook": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    "a profiler": lambda: torch.autograd.profiler.profile(),
    "another current directory": lambda: changed(os.chdir, "/", os.getcwd()),
}  # fmt: skip


# The others run with the long tests.
FIRST = (
    "float64 by default", "meta by default", "deterministic algorithms", "inference mode", "NumPy raises",
    "warnings are errors",
)  # fmt: skip
SETTINGS = [name if name in FIRST else pytest.param(name, marks=pytest.mark.thorough) for name in SAME]


def decoded(model: Transformer) -> list[Any]:
    found: list[Any] = []
    for strategy in ("tidar", "isd", "tree", "self_speculation"):
        found.append(tk.Decoder(model, 3, strategy=strategy).generate(PROMPTS, 6).tokens)  # type: ignore[arg-type]  # noqa: PERF401
    found.append(tk.Decoder(model, mode="autoregressive").generate(PROMPTS, 6, temperature=0.8, seed=3).tokens)
    decoder = tk.Decoder(model, 2, batch_size=2, max_len=24)
    decoder.add(PROMPTS[0], 5)
    events = decoder.step()
    decoder.add(PROMPTS[2], 5)
    while any(event.finish_reason is None for event in events) or len(events) < 1:
        events = decoder.step()
    found.append([event.tokens for event in events])
    return found


def operated() -> list[Tensor]:
    """Operators and layers on operands of their own, with gradients where the setting has them."""
    draw = torch.Generator("cpu").manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu")

    q, k, v = randn(2, 4, 12, 16), randn(2, 2, 12, 16), randn(2, 2, 12, 16)
    found = [tk.attention(q, k, v, patterns.tidar_training(6, 2))]
    cache = tk.KVCache(
        num_layers=1,
        batch_size=2,
        num_kv_heads=2,
        head_dim=16,
        max_len=24,
        page_size=4,
        device="cpu",
        dtype=torch.float32,
    )
    cache.append(0, k[:, :, :5], v[:, :, :5])
    cache.commit(5)
    step = patterns.tidar_step(3)
    rows = [x[:, :, : step.q_len] for x in (q, k, v)]
    found.append(tk.step_attention(*rows, *cache.layer(0), cache.lengths, step, **cache.options(0)))
    x, weight = randn(5, 8), randn(6, 8)
    found.append(tk.row_invariant_linear(x, weight))
    gate = torch.tensor([True, False, True, False, True], device="cpu")
    found.append(tk.gated_lora(x, weight, randn(2, 8), randn(6, 2), gate, 0.5))
    found.append(tk.sample(randn(2, 3, 30), torch.tensor([1, 2], device="cpu"), tk.SamplingParams(0.7, 5, seed=3)))
    if torch.is_grad_enabled():
        leaf = q.clone().requires_grad_()
        tk.attention(leaf, k, v, patterns.tidar_training(6, 2)).square().sum().backward()
        assert leaf.grad is not None
        found.append(leaf.grad)
        hidden = randn(1, 12, 8).requires_grad_()
        tokens = torch.tensor([[1, 2, 3, 4, 5, 6]], device="cpu")
        tk.tidar_loss(hidden, randn(30, 8), tokens, patterns.tidar_training(6, 2)).loss.backward()
        assert hidden.grad is not None
        found.append(hidden.grad)
    return found


@pytest.fixture(scope="module")
def expected() -> tuple[Transformer, list[Any], list[Tensor]]:
    model = sharp_model().eval()
    return model, decoded(model), operated()


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_do_not_depend_on_settings(setting: str, expected: tuple[Transformer, list[Any], list[Tensor]]) -> None:
    model, tokens, tensors = expected
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection")
        with SAME[setting]():
            found, results = decoded(model), operated()
    assert found == tokens
    for one, other in zip(results, tensors, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_models_and_files_are_made_under_settings(setting: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection")
        with SAME[setting]():
            model = Transformer(CONFIG)
            if not model.norm.weight.is_meta:
                models.save_checkpoint(model, tmp_path / "model")
                models.load_checkpoint(tmp_path / "model")
                tk.add_gated_lora(model, 2, 4.0, ("q_proj",))
                tk.save_adapter(model, tmp_path / "adapter", base_model="base")
                tk.load_peft_adapter(sharp_model(), tmp_path / "adapter")
                tk.Decoder(model, 2).generate([[1, 2]], 2)
            strategies.auto(strategies.Profile((0.5,), (1, 4), (1.0, 2.0)))
            str(patterns.tidar_step(3).draw(context_len=2))


def test_another_thread_and_a_fork_compute_the_same(expected: tuple[Transformer, list[Any], list[Tensor]]) -> None:
    model, tokens, _ = expected
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(decoded(model)))
    thread.start()
    thread.join()
    assert found == [tokens]


SCRIPT = """
import torch, tidar_kernels as tk
from tests.toys import sharp_model, PROMPTS
print(tk.Decoder(sharp_model().eval(), 3).generate(PROMPTS, 6).tokens)
"""
COMMANDS: dict[str, tuple[list[str], dict[str, str | None]]] = {
    "-O": (["-O"], {}), "-OO": (["-OO"], {}), "-X dev": (["-X", "dev"], {}), "-W error": (["-W", "error"], {}),
    "no UTF-8": (["-X", "utf8=0"], {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "no HOME": ([], {"HOME": None, "XDG_CACHE_HOME": None}),
    "HOME is a file": ([], {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}),
    "no caches": ([], {"TRITON_CACHE_DIR": "/proc/none", "TORCHINDUCTOR_CACHE_DIR": "/proc/none", "TMPDIR": "/none"}),
    "no PATH": ([], {"PATH": None}), "3 threads": ([], {"OMP_NUM_THREADS": "3"}),
    "no bytecode": (["-B"], {}), "another hash seed": ([], {"PYTHONHASHSEED": "1"}),
}  # fmt: skip


def run(flags: list[str], environment: dict[str, str | None], *arguments: str, **options: Any) -> Any:
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    return subprocess.run(
        [sys.executable, *flags, *arguments],
        env={name: value for name, value in known.items() if value is not None},
        capture_output=True, text=True, timeout=120, encoding="utf-8", **options,
    )  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMMANDS)
def test_processes_compute_the_same(name: str) -> None:
    flags, environment = COMMANDS[name]
    plain = run([], {}, "-c", SCRIPT)
    found = run(flags, environment, "-c", SCRIPT)
    assert (found.returncode, found.stdout) == (0, plain.stdout), found.stderr[-2000:]


@pytest.mark.thorough
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_runs(name: str) -> None:
    flags, environment = COMMANDS[name]
    found = run(flags, environment, "-m", "tidar_kernels", "draw", "step", "--block-size", "3")
    assert (found.returncode, found.stderr) == (0, "")
