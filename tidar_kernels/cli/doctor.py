"""`tidar-kernels doctor`: what this machine has, which code runs on it, and whether that computes the right thing."""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .common import (
    FAILED,
    OK,
    PROGRAM,
    Terminal,
    add_device_argument,
    add_json_argument,
    import_torch,
    one_line,
    print_json,
    resolve_device,
    table,
    versions,
)

if TYPE_CHECKING:
    import torch

    from ..testing import ParityResult

SUMMARY = "show what this machine runs, and check that it computes the right thing"

USAGE = "[options]"

EPILOG = f"""\
The self-check compares every operator with eager PyTorch in float64, at a few
cases of tidar_kernels.testing; --parity does so at all of them. On a GPU that
checks the compiled kernels, with TRITON_INTERPRET=1 the interpreted ones (which
takes minutes), and otherwise what the operators run on a CPU. The exit code is
1 if any check fails.

examples:
  {PROGRAM} doctor
  {PROGRAM} doctor --parity
  TRITON_INTERPRET=1 {PROGRAM} doctor --parity
  {PROGRAM} doctor --json
"""

# What the operators run on a CPU, without the interpreter.
OPERATORS = {
    "step_attention": "PyTorch, fused CPU attention",
    "attention": "PyTorch, fused CPU attention",
    "append_kv": "PyTorch, slice copies",
    "compact_kv": "PyTorch",
    "rotary_append": "PyTorch, slice copies",
    "verify, sample": "PyTorch",
    "gated_lora": "PyTorch",
    "row_invariant_linear": "PyTorch",
}

# What pyproject.toml admits: at least this version, and below that one.
SUPPORTED: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "python": ((3, 10), (3, 14)),
    "torch": ((2, 11), None),
    "triton": ((3, 6), None),
}

# The kernels are tested from this compute capability on.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Check:
    """One thing that was tested, and how it came out."""

    name: str
    ok: bool
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parity", action="store_true", help="run every case of the parity harness, not only a few")
    add_device_argument(parser)
    add_json_argument(parser)


def run(options: argparse.Namespace) -> int:
    import_torch()
    device = resolve_device(options.device)
    terminal = None if options.json else Terminal()
    report: dict[str, Any] = {
        "versions": versions(),
        **describe_machine(device),
        "operators": operator_paths(device),
        "launch_configurations": launch_configurations(device),
    }
    if terminal:
        _print_report(terminal, report)

    checks = check_versions(report["versions"], needs_triton=report["path"] != "cpu")
    checks.append(check_vllm())
    if report["gpu"]:
        checks.append(check_capability(report["gpu"]["capability"]))
    checks.append(check_model())
    parity, results = check_parity(device, options.parity, terminal)
    checks += parity
    failed = [check for check in checks if not check.ok]
    if terminal:
        _print_checks(terminal, checks)
        print()
        print(f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed")
    else:
        checked = {"ok": not failed, "checks": [asdict(check) for check in checks]}
        print_json(checked | report | {"parity": [asdict(result) | {"passed": result.passed} for result in results]})
    return FAILED if failed else OK


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device that would be used, what runs on it, the GPU if it is one, and the CPU."""
    import torch

    from ..testing import path_of

    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return {
        "device": str(device),
        "path": path_of(device),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "triton_interpret": os.environ.get("TRITON_INTERPRET"),
    }


def operator_paths(device: torch.device) -> dict[str, str]:
    """What runs each public operator on this device; see `tidar_kernels.ops`."""
    from ..ops import interpreting
    from ..testing import path_of

    if path_of(device) != "cpu":
        kernel = "Triton kernel, interpreted" if interpreting() else "Triton kernel"
        return dict.fromkeys(OPERATORS, kernel)
    return dict(OPERATORS)


def launch_configurations(device: torch.device) -> list[dict[str, Any]]:
    """Tiles of the step kernel on this device, by dtype and head dim; empty where no kernel is launched."""
    import torch

    from ..testing import path_of

    if path_of(device) == "cpu":
        return []
    try:
        from ..ops._triton.configs import HEAD_DIM_TILES, chip_of, step_config
    except ImportError:  # no Triton: a check says so
        return []
    chip = chip_of(device)
    return [
        {
            "kernel": "step_attention",
            "dtype": "float32" if dtype == torch.float32 else "float16, bfloat16",
            "head_dim": head_dim,
            **asdict(step_config(chip, dtype, head_dim)),
        }
        for dtype in (torch.float16, torch.float32)
        for head_dim in HEAD_DIM_TILES
    ]


def check_versions(installed: dict[str, str | None], needs_triton: bool) -> list[Check]:
    """Every version is one that the package supports."""
    checks = []
    for name, (least, below) in SUPPORTED.items():
        version = installed[name]
        expected = f">= {_dotted(least)}" + (f", < {_dotted(below)}" if below else "")
        if version is None:
            ok = name == "triton" and not needs_triton
            detail = "not installed, and not needed on a CPU" if ok else f"expected {expected}, got none"
        else:
            major_minor = tuple(map(int, re.findall(r"\d+", version)[:2]))
            ok = least <= major_minor and (below is None or major_minor < below)
            detail = version if ok else f"expected {expected}, got {version}"
        checks.append(Check(name, ok, detail))
    return checks


def check_vllm() -> Check:
    """What `tidar-kernels serve` would find. vLLM may be there for other things, so no version of it is a fault."""
    from ..integrations.vllm import SUPPORTED as tried
    from ..integrations.vllm.plugin import installed_version

    version, wanted = installed_version(), ", ".join(f"{release}.x" for release in tried)
    if version is None:
        return Check("vllm", True, f"not installed; tidar-kernels serve needs {wanted}")
    serves = version.startswith(tuple(f"{release}." for release in tried))
    return Check("vllm", True, version if serves else f"{version}; tidar-kernels serve needs {wanted}")


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def check_capability(capability: str) -> Check:
    """The GPU is of a generation that the kernels are written for."""
    ok = tuple(map(int, capability.split("."))) >= LEAST_CAPABILITY
    least = _dotted(LEAST_CAPABILITY)
    return Check("GPU", ok, capability if ok else f"expected compute capability >= {least}, got {capability}")


def check_model() -> Check:
    """The model that came with the package loads."""
    from ..models import load_shipped

    try:
        model, _ = load_shipped()
    except (OSError, ValueError) as error:
        return Check("shipped model", False, one_line(error))
    return Check("shipped model", True, f"{sum(p.numel() for p in model.parameters()):,} parameters")


def check_parity(device: torch.device, full: bool, terminal: Terminal | None) -> tuple[list[Check], list[ParityResult]]:
    """Parity of every operator on this device; on a GPU, a few cases of the CPU path too."""
    from ..testing import SUITES, path_of, run_parity

    runs = [(str(device), not full)] if path_of(device) != "triton" else [(str(device), not full), ("cpu", True)]
    checks, results = [], []
    for where, quick in runs:
        for suite in SUITES:
            name = f"{suite.operator} on {where}"
            if terminal:
                terminal.status(f"checking {name}")
            started = time.perf_counter()
            try:
                found = run_parity(where, quick=quick, operators=[suite.operator])
            except Exception as error:  # whatever breaks on this machine is what a doctor is asked to name
                checks.append(Check(name, False, f"{type(error).__name__}: {one_line(error)}"))
                continue
            finally:
                if terminal:
                    terminal.status("")
            results += found
            if found:
                checks.append(Check(name, *_verdict(found, time.perf_counter() - started)))
    return checks, results


def _verdict(results: list[ParityResult], seconds: float) -> tuple[bool, str]:
    """Whether all of an operator's cases passed, and what there is to say about them."""
    failures = [result.failure for result in results if result.failure]
    if failures:
        return False, f"{len(failures)} of {len(results)} cases; {one_line(failures[0])}"
    spent = [measure.error / measure.budget for result in results for measure in result.measures]
    accuracy = f"at most {max(spent):.0%} of the error budget" if spent else "bit for bit"
    cases = f"{len(results)} case{'s' * (len(results) > 1)}"
    return True, f"{cases}, {accuracy}, {seconds:.1f} s"


def _print_report(terminal: Terminal, report: dict[str, Any]) -> None:
    gpu = report["gpu"]
    if gpu:
        described = f"{gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB"
    else:
        built = f"built for CUDA {report['cuda']}" if report["cuda"] else "built without CUDA"
        described = f"none in use (PyTorch is {built})"
    machine = {
        "device": report["device"],
        "GPU": described,
        "CPU": f"{report['cpu']}, {report['threads']} threads",
        "TRITON_INTERPRET": report["triton_interpret"] or "not set",
    }
    named = {name.replace("_", "-"): version or "not installed" for name, version in report["versions"].items()}
    for title, entries in (("versions", named), ("machine", machine), ("operators", report["operators"])):
        print(terminal.bold(title))
        print("\n".join(f"  {line}" for line in table(list(entries.items()), "<<")))
        print()

    print(terminal.bold("launch configurations"))
    configurations = report["launch_configurations"]
    if configurations:
        head, *rows = [list(configurations[0]), *([str(cell) for cell in row.values()] for row in configurations)]
        print("\n".join(f"  {line}" for line in table([head, *rows], "<<" + ">" * (len(head) - 2))))
    else:
        print("  none: no kernel is launched on this device")
    print()


def _print_checks(terminal: Terminal, checks: list[Check]) -> None:
    print(terminal.bold("checks"))
    lines = table([("ok" if check.ok else "FAILED", check.name, check.detail) for check in checks], "<<<")
    for check, line in zip(checks, lines, strict=True):
        word = terminal.green("ok") if check.ok else terminal.red("FAILED")
        print(f"  {word}{line.removeprefix('ok' if check.ok else 'FAILED')}")
