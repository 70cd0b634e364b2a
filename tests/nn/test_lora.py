"""The wrapped projection and its gate, and adapters that PEFT wrote or reads."""

from __future__ import annotations

import json
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tidar_kernels.nn.adapters import (
    CONFIG,
    WEIGHTS,
    GatedLoRA,
    add_gated_lora,
    load_peft_adapter,
    lora_gate,
    save_adapter,
)
from tidar_kernels.ops import row_invariant_linear
from tidar_kernels.testing import budget

PATHS = [pytest.param("cpu"), pytest.param("interpreter", marks=pytest.mark.interpret)]
TARGETS = ("q_proj", "down_proj")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(12, 20), nn.Linear(12, 20)
        self.down_proj = nn.Linear(20, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(F.silu(self.q_proj(x)) * self.k_proj(x))


class Toy(nn.Module):
    """Two residual layers, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def with_adapters(toy: nn.Module, rank: int = 3, **options: Any) -> nn.Module:
    """Adapters that change something: B is not 0."""
    add_gated_lora(toy, rank, 6.0, TARGETS, **options)
    for module in toy.modules():
        if isinstance(module, GatedLoRA):
            nn.init.normal_(module.lora_b)
    return toy


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_adapter_are_the_base_models(path: str) -> None:
    toy = Toy()
    x, gate = torch.randn(2, 9, 12), torch.rand(9) < 0.5
    gate[:2] = torch.tensor([True, False])
    plain = toy(x)
    adapted = with_adapters(toy)
    for mode in (True, False):
        adapted.train(mode)
        with lora_gate(gate):
            out = adapted(x)
        with lora_gate(False):
            base = adapted(x)
        assert torch.equal(out[:, ~gate], base[:, ~gate])
        assert not bool((out[:, gate] == base[:, gate]).all(-1).any())
        torch.testing.assert_close(base, plain)
        with lora_gate(True):
            everywhere = adapted(x)
        torch.testing.assert_close(everywhere[:, gate], out[:, gate])
        if mode:
            assert torch.equal(base, plain)


@pytest.mark.parametrize("path", PATHS)
def test_the_base(path: str) -> None:
    linear, x = nn.Linear(33, 20), torch.randn(9, 33)
    library, invariant = F.linear(x, linear.weight, linear.bias), row_invariant_linear(x, linear.weight, linear.bias)
    assert not torch.equal(library, invariant) or path == "cpu"
    for row_invariant, expected in ((False, library), (True, invariant)):
        wrapped = GatedLoRA(linear, 4, 8.0, row_invariant=row_invariant)
        for gate in (False, torch.zeros(9)):
            with lora_gate(gate):
                assert torch.equal(wrapped(x), expected)


@pytest.mark.parametrize("path", PATHS)
def test_only_adapters_train(path: str) -> None:
    toy, x = with_adapters(Toy()), torch.randn(3, 4, 12)
    gate = torch.tensor([[1.0, 0.0, 0.0, 0.5]])
    with lora_gate(gate):
        toy(x).square().sum().backward()
    trained = {name for name, p in toy.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in toy.named_parameters() if p.requires_grad}
    assert trained == {f"layers.{i}.{t}.lora_{ab}" for i in range(2) for t in TARGETS for ab in "ab"}
    assert all(bool(p.grad.any()) for p in toy.parameters() if p.grad is not None)


def test_a_new_adapter_changes_nothing() -> None:
    toy, x = Toy(), torch.randn(5, 12)
    expected = toy(x)
    assert add_gated_lora(toy, 2, 4.0, ["q_proj"]) == ["layers.0.q_proj", "layers.1.q_proj"]
    with lora_gate(True):
        assert torch.equal(toy(x), expected)


def test_a_gate_must_be_open() -> None:
    toy, x = with_adapters(Toy()), torch.randn(5, 12)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"^lora_gate: expected an open lora_gate\(gate\) .*, got none$"):
            toy(x)
        with pytest.raises(ValueError, match=r"^gate: expected a shape that broadcasts"), lora_gate(torch.ones(4)):
            toy(x)
    with lora_gate(True), lora_gate(False):
        base = toy(x)
    with lora_gate(False), lora_gate(True):
        assert not torch.equal(toy(x), base)
    with pytest.raises(TypeError, match=r"^gate: expected a torch.Tensor or a bool, got int$"), lora_gate(1):  # type: ignore[arg-type]
        pass


def test_a_gate_belongs_to_its_thread() -> None:
    toy, x, failures = with_adapters(Toy()), torch.randn(5, 12), []

    def other() -> None:
        try:
            toy(x)
        except RuntimeError as error:
            failures.append(error)

    with lora_gate(True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(failures) == 1


def test_checkpointed_activations() -> None:
    toy, x, gate = with_adapters(Toy()), torch.randn(4, 12), torch.tensor([1.0, 0.0, 0.0, 1.0])
    grads = []
    for recomputed in (False, True):
        toy.zero_grad()
        with lora_gate(gate):
            out = toy(x)
            if recomputed:
                contexts = lambda: (nullcontext(), lora_gate(gate))  # noqa: E731
                out = checkpoint(toy, x, use_reentrant=False, context_fn=contexts)
        out.square().sum().backward()
        grads.append([p.grad.clone() for p in toy.parameters() if p.grad is not None])
    assert grads[0]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_without_a_graph_break() -> None:
    toy, x, gate = with_adapters(Toy()), torch.randn(4, 12), torch.tensor([1.0, 0.0, 0.0, 1.0])
    compiled = torch.compile(toy, fullgraph=True, backend="aot_eager")
    with lora_gate(gate):
        assert torch.equal(compiled(x), toy(x))
    with lora_gate(1.0 - gate):
        assert torch.equal(compiled(x), toy(x))


def test_a_half_model_keeps_its_adapter_in_float32() -> None:
    toy = with_adapters(Toy().bfloat16(), dtype=torch.float32)
    x = torch.randn(4, 12, dtype=torch.bfloat16)
    with lora_gate(True):
        out = toy(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.grad.dtype for p in toy.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": ["q_proj", "o_proj"]}, ValueError, r"^targets: expected names of modules .*, got 'o_proj'$"),
        ({"targets": ["q_proj", "layers.0"]}, TypeError, r"^targets: expected layers.0 to be an nn.Linear, got Layer$"),
        ({"rank": 0}, ValueError, r"^rank: expected >= 1, got 0$"),
        ({"alpha": float("inf")}, ValueError, r"^alpha: expected a finite number, got inf$"),
    ],
)
def test_bad_targets_change_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    toy = Toy()
    with pytest.raises(error, match=message):
        add_gated_lora(toy, **({"rank": 2, "alpha": 4.0, "targets": TARGETS} | change))
    assert all(p.requires_grad for p in toy.parameters())
    assert not any(isinstance(module, GatedLoRA) for module in toy.modules())


def test_other_mistakes() -> None:
    toy = with_adapters(Toy())
    with pytest.raises(ValueError, match=r"^targets: expected modules without an adapter, got layers.0.q_proj$"):
        add_gated_lora(toy, 2, 4.0, ["q_proj"])
    with pytest.raises(TypeError, match=r"^linear: expected an nn.Linear, got Embedding$"):
        GatedLoRA(nn.Embedding(3, 4), 2, 4.0)  # type: ignore[arg-type]
    packed = nn.Linear(8, 4)
    packed.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"^linear: expected a float weight of shape \[4, 8\], got torch.uint8"):
        GatedLoRA(packed, 2, 4.0)
    with pytest.raises(ValueError, match=r"^model: expected GatedLoRA modules, got none$"):
        save_adapter(Toy(), "nowhere")


def peft_model(toy: nn.Module, **changes: Any) -> Any:
    """PEFT's own model around a toy, with an adapter that changes something."""
    peft = pytest.importorskip("peft")
    config = {"r": 4, "lora_alpha": 10, "target_modules": list(TARGETS), "lora_dropout": 0.0} | changes
    model = peft.get_peft_model(toy, peft.LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.q_proj": 7, "down_proj": 1}, "alpha_pattern": {r"^layers\.0\..*": 3}},
        {"target_modules": r".*\.1\.(q|k)_proj"},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
    ],
    ids=["plain", "rslora", "patterns", "expression", "one_layer"],
)
def test_peft_adapters(changes: dict[str, Any], tmp_path: Path) -> None:
    """At gate 1, the outputs of PEFT, merged and not; at gate 0, those of the base; and back again."""
    toy, x = Toy(), torch.randn(50, 12)
    state, base = {k: v.clone() for k, v in toy.state_dict().items()}, toy(x)
    theirs = peft_model(toy, **changes)
    with torch.no_grad():
        expected = theirs(x)
    theirs.save_pretrained(str(tmp_path / "theirs"))

    ours = Toy()
    ours.load_state_dict(state)
    names = load_peft_adapter(ours, tmp_path / "theirs")
    assert names
    with torch.no_grad(), lora_gate(True):
        out = ours(x)
    with lora_gate(False):
        assert torch.equal(ours(x), base)
    merged = theirs.merge_and_unload()
    with torch.no_grad():
        reference = merged.double()(x.double())
    budget(out, reference, expected, by_row=True)
    assert not torch.allclose(out, base)

    save_adapter(ours, tmp_path / "ours")
    saved, original = (load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs"))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    peft, again = pytest.importorskip("peft"), Toy()
    again.load_state_dict(state)
    reread = peft.PeftModel.from_pretrained(again, str(tmp_path / "ours"))
    with torch.no_grad():
        assert torch.equal(reread(x), expected)


def test_an_adapter_replaces_another(tmp_path: Path) -> None:
    first, second = with_adapters(Toy(), 3), with_adapters(Toy(), 5)
    base = {k.replace("base.", ""): v for k, v in second.state_dict().items() if "lora" not in k}
    save_adapter(first, tmp_path)
    save_adapter(first, tmp_path)  # over the old files
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    random = torch.get_rng_state()
    assert len(load_peft_adapter(second, tmp_path)) == 4
    assert torch.equal(torch.get_rng_state(), random)
    assert second.layers[0].q_proj.rank == 3
    assert isinstance(second.layers[0].q_proj.base, nn.Linear)
    fresh = Toy()
    fresh.load_state_dict(base)
    load_peft_adapter(fresh, tmp_path)
    with lora_gate(True):
        assert torch.equal(fresh(torch.ones(3, 12)), second(torch.ones(3, 12)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, r"expected peft_type 'LORA', got 'LOHA'$"),
        ({"use_dora": True}, r"expected an adapter without use_dora, got True$"),
        ({"modules_to_save": ["lm_head"]}, r"expected an adapter without modules_to_save, got \['lm_head'\]$"),
        ({"fan_in_fan_out": True}, r"expected an adapter without fan_in_fan_out, got True$"),
        ({"lora_bias": True}, r"expected an adapter without lora_bias, got True$"),
        ({"bias": "all"}, r"expected bias 'none', got 'all'$"),
        ({"init_lora_weights": "pissa"}, r"expected the base weights untouched, got 'pissa'$"),
        ({"r": None}, r"expected numbers r and lora_alpha, got None, 6.0$"),
        ({"r": 4}, r"^layers.0.down_proj.lora_A: expected shape \[4, 20\], got \[3, 20\]$"),
        ({"rank_pattern": {"layers.1.down_proj": 2}}, r"^layers.1.down_proj.lora_A: expected shape \[2, 20\]"),
        ({"alpha_pattern": {"q_proj": "x"}}, r"expected a number in alpha_pattern for 'q_proj', got 'x'$"),
        (
            {"target_modules": ["k_proj"]},
            r"expected tensors for layers.0.k_proj, which target_modules names, got none$",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(with_adapters(Toy()), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    refused(tmp_path, message)


def refused(folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    """Loading raises, and the model stays as it was."""
    toy = Toy()
    with pytest.raises(error, match=message):
        load_peft_adapter(toy, folder)
    assert all(p.requires_grad for p in toy.parameters())
    assert not any(isinstance(module, GatedLoRA) for module in toy.modules())


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    save_adapter(with_adapters(Toy()), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.layers.1.down_proj.lora_B.weight"

    def with_tensors(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, tmp_path / WEIGHTS)
        refused(tmp_path, message)

    with_tensors(
        tensors | {key: torch.ones(13, 3)}, r"^layers.1.down_proj.lora_B: expected shape \[12, 3\], got \[13, 3\]$"
    )
    without = {k: v for k, v in tensors.items() if k != key}
    with_tensors(without, r"expected lora_A and lora_B of layers.1.down_proj, got only lora_A$")
    foreign = {k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}
    with_tensors(foreign, r"expected modules of the model, got layers.7.down_proj$")
    with_tensors(tensors | {"lm_head.weight": torch.ones(1)}, r"expected tensors .*, got lm_head.weight$")
    with_tensors({}, r"expected adapter tensors, got none$")
    (tmp_path / WEIGHTS).write_bytes(b"\x08")
    refused(tmp_path, r"expected a complete safetensors file")
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, rf"^path: expected a folder with {WEIGHTS}", FileNotFoundError)
    (tmp_path / CONFIG).write_text("{")
    refused(tmp_path, r"expected JSON")
    (tmp_path / CONFIG).unlink()
    refused(tmp_path, rf"^path: expected a folder with {CONFIG}", FileNotFoundError)
