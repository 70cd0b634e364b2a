"""The package as a whole: what importing it costs, who imports whom, what the wheel holds."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import tidar_kernels

REPOSITORY = Path(__file__).resolve().parents[1]  # not from tests.paths: this file runs from the source archive too
PACKAGE = REPOSITORY / "tidar_kernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Modules whose import the blocker turns into an ImportError, as on a machine without them.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, *blocked: str) -> str:
    """Standard output of `code` in a fresh interpreter in which the `blocked` packages cannot be imported."""
    result = subprocess.run(
        [sys.executable, "-c", BLOCKER.format(blocked=blocked) + code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TRITON_INTERPRET": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_cheap_and_needs_no_triton() -> None:
    code = """
import json, torch
before = set(sys.modules)
import tidar_kernels
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = json.loads(run_python(code, "triton", "matplotlib", "safetensors", "transformers"))
    others = [name for name in loaded if name.split(".")[0] != "tidar_kernels"]
    # Beyond `import torch` the package may cost a few small modules of torch and the standard library, no framework.
    assert {name.split(".")[0] for name in others} <= {"torch", "numpy"} | set(sys.stdlib_module_names)
    assert len(others) <= 20
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in others)


def test_only_kernels_need_triton() -> None:
    """Every module but those of kernels and of integrations imports without Triton and matplotlib."""
    others = (
        *(is_of_kernels, needs_vllm, needs_automodel),
        lambda name: "integrations.transformers" in name or name.endswith("__main__"),
    )
    names = [name for name in module_names() if not any(is_other(name) for is_other in others)]
    assert "tidar_kernels.ops" in names
    run_python(f"import importlib\nfor name in {names!r}: importlib.import_module(name)", "triton", "matplotlib")


def is_of_kernels(name: str) -> bool:
    return "._triton" in name or name.split(".")[-1].startswith(("triton", "gluon"))


def needs_vllm(name: str) -> bool:
    """The modules that vLLM itself asks for; the rest of the plug-in works where there is none."""
    package, _, module = name.rpartition(".")
    return package.endswith("integrations.vllm") and module in (
        "backend", "metrics", "models", "requests", "sampler", "state"
    )  # fmt: skip


def needs_automodel(name: str) -> bool:
    return name.endswith("integrations.automodel")


def module_names() -> list[str]:
    return ["tidar_kernels", *(found.name for found in pkgutil.walk_packages([str(PACKAGE)], "tidar_kernels."))]


@pytest.mark.parametrize("name", [name for name in module_names() if not name.endswith("__main__")])
def test_public_names_exist(name: str) -> None:
    if is_of_kernels(name):
        pytest.importorskip("triton")
    if needs_vllm(name):
        pytest.importorskip("vllm")
    if needs_automodel(name):
        pytest.importorskip("nemo_automodel")
    module = importlib.import_module(name)
    missing = [public for public in getattr(module, "__all__", []) if not hasattr(module, public)]
    assert not missing


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_assert_in_the_package(path: Path) -> None:
    """`python -O` removes asserts, so checks are not written with them."""
    lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert lines == []


def test_versions_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", tidar_kernels.__version__)
    assert f"## [{tidar_kernels.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "options", [["-m", "not slow"], pytest.param(["-m", "models or slow"], marks=pytest.mark.thorough)]
)
def test_tests_on_request_are_not_collected_unasked(options: list[str]) -> None:
    """Whatever `-m` says: it replaces another `-m`, so nothing is left out by one."""
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider"]
    file = "tests/integrations/transformers/test_every_model.py"
    found = subprocess.run([*collect, *options, file], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert "test_every_type" not in found.stdout, found.stdout[:2000]
    assert "deselected" in found.stdout, found.stdout + found.stderr


def test_every_requirement_is_pinned() -> None:
    """What `make venv` installs has one version in the constraints file; `hf` is the user's choice of version."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + extras["bench"] + extras["docs"] + extras["test"]
    names = {re.match(r"[\w-]+", requirement).group() for requirement in required} - {project["name"]}
    pinned = set(re.findall(r"^([\w-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE))
    assert names <= pinned


@pytest.mark.slow
@pytest.mark.skipif(find_spec("build") is None, reason="needs the build package")
def test_wheel_runs_elsewhere(tmp_path: Path) -> None:
    """The wheel, made from the source archive, holds the whole package and nothing else, and runs without the tree."""
    source = copy_of_the_tree(tmp_path / "source")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def run(*arguments: str, cwd: Path, **variables: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=cwd,
            env={**environment, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run("build", "--no-isolation", "--outdir", str(tmp_path / "dist"), cwd=source)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {path.relative_to(source).as_posix() for path in package_files(source)}
    metadata = zipfile.ZipFile(wheel).read(f"tidar_kernels-{tidar_kernels.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {tidar_kernels.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata

    site = tmp_path / "site"
    run("pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel), cwd=tmp_path)
    (tmp_path / "where.py").write_text("import tidar_kernels; print(tidar_kernels.__file__)")
    assert Path(run("where", cwd=tmp_path, PYTHONPATH=str(site)).strip()).is_relative_to(site)
    assert "generate" in run("tidar_kernels", "--help", cwd=tmp_path, PYTHONPATH=str(site))


def package_files(root: Path) -> list[Path]:
    """What a wheel must hold: sources, the typing marker, and the shipped checkpoint with its figures."""
    package = root / "tidar_kernels"
    shipped = [path for suffix in ("json", "safetensors") for path in package.glob(f"models/shipped/*.{suffix}")]
    return [*package.rglob("*.py"), package / "py.typed", *shipped]


def copy_of_the_tree(target: Path) -> Path:
    """Copies of the files that make the package, so that building leaves nothing behind in the repository."""
    names = ["CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "setup.py"]
    for path in [*(REPOSITORY / name for name in names), *package_files(REPOSITORY), Path(__file__).resolve()]:
        copy = target / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return target
