"""`lossless`: nothing found where nothing is wrong; a planted fault found, and the stage that it lies in named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from tests.integrations.transformers.test_convert import tiny  # noqa: E402
from tidar_kernels.decoding.strategies import base  # noqa: E402
from tidar_kernels.integrations.transformers import attention  # noqa: E402
from tidar_kernels.integrations.transformers.lossless import LosslessReport, lossless  # noqa: E402
from tidar_kernels.nn.adapters import add_gated_lora, has_gated_lora, lora_gate, save_adapter  # noqa: E402

PROMPTS = [[1, 4, 9, 16, 25], [2, 3, 5, 7, 11, 13, 17, 19], [26]]


def check(model: Any, **options: Any) -> LosslessReport:
    return lossless(model, PROMPTS, block_size=4, max_new_tokens=12, **options)


@pytest.mark.parametrize("strategy", ["tidar", "isd", "self_speculation", "prompt_lookup"])
def test_equal_texts_are_said_equal(strategy: str) -> None:
    model = tiny().eval()
    report = check(model, strategy=strategy)
    assert report.equal == len(PROMPTS)
    assert model.config._attn_implementation == "sdpa"
    assert report.new_tokens == sum(each.tokens for each in report.trajectories) > 3


@pytest.mark.parametrize("strategy", ["tidar", "isd", "self_speculation"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_exact_rows_are_equal_in_every_bit(strategy: str, temperature: float) -> None:
    report = check(tiny().eval(), strategy=strategy, exact=True, temperature=temperature)
    assert (report.equal, report.equal_bits) == (3, 3)
    assert set(report.stages) >= {"projection", "norm", "lm_head"}
    assert all(rows > 0 and depending == 0 for rows, depending in report.stages.values())


class _RoundsByRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.5 * y.roll(1, -1) if x.shape[1] > 1 else y


def plant_projection(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[1].mlp.up_proj.__class__ = _RoundsByRows


def plant_norm(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = model.model.layers[1].post_attention_layernorm
    plain = type(norm).forward
    monkeypatch.setattr(norm, "forward", lambda x: plain(norm, x) * (1.7 if x.shape[1] > 1 else 1.0))


def plant_lm_head(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = model.lm_head
    plain = type(head).forward
    monkeypatch.setattr(head, "forward", lambda x: plain(head, x.flip(-1) if x.shape[1] > 1 else x))


def plant_leak(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft rows see the value of the last mask row."""
    plain = attention.ops.step_attention

    def leaking(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> Tensor:
        out = plain(q, k, v, *others, **options)
        seen = v[:, :, -1:].repeat_interleave(q.shape[1] // v.shape[1], 1)
        return out + 2 * seen if k.shape[2] > 8 else out

    monkeypatch.setattr(attention.ops, "step_attention", leaking)


def plant_sampler(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token after the drafts is the next one of the vocabulary."""
    plain = base.verify

    def off_by_one(logits: Tensor, drafts: Tensor, *others: Any, **options: Any) -> Any:
        found = plain(logits, drafts, *others, **options)
        return found._replace(next_tokens=(found.next_tokens + 1) % 26) if drafts.shape[1] > 1 else found

    monkeypatch.setattr(base, "verify", off_by_one)


FAULTS: list[tuple[str, str, Callable[..., None]]] = [
    ("projection", "layers.1.mlp.up_proj", plant_projection),
    ("norm", "layers.1.post_attention_layernorm", plant_norm),
    ("lm_head", "lm_head", plant_lm_head),
    ("attention", "layers.0.self_attn.o_proj", plant_leak),
    ("sampler", "", plant_sampler),
]


@pytest.mark.parametrize(("stage", "module", "plant"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_found_and_its_stage_named(
    stage: str, module: str, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among exact rows, which are equal in every bit, it is the only cause."""
    model = tiny().eval()
    monkeypatch.setattr(
        "tidar_kernels.integrations.transformers.model.TransformersModel._check_by_running", lambda self: None
    )
    plant(model, monkeypatch)
    report = check(model, exact=True, mask_token_id=20)
    found = [each.divergence for each in report.trajectories if each.divergence is not None]
    assert found
    assert {(each.stage, each.module) for each in found} == {(stage, module)}
    if stage in ("projection", "norm", "lm_head"):
        rows, depending = report.stages[stage]
        assert 0 < depending <= rows


def test_a_divergence_says_where_and_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().eval()
    plant_sampler(model, monkeypatch)
    for prompt, each in zip(PROMPTS, check(model).trajectories, strict=True):
        found = each.divergence
        assert found is not None
        assert found.got == (found.expected + 1) % 26
        own = model.generate(torch.tensor([prompt]), max_new_tokens=found.index + 1, do_sample=False)[0].tolist()
        assert own[-1] == found.expected
        logits = model(input_ids=torch.tensor([own[:-1]])).logits[0, -1].detach()
        assert found.margin == pytest.approx(float(logits[found.expected] - logits[found.got]), rel=1e-3)
        assert found.margin > 0
        assert found.stage == "sampler"


def test_the_assistant_of_transformers_is_compared_with_generate() -> None:
    assert check(tiny().eval(), strategy="assistant", assistant=tiny(hidden_size=16).eval()).equal == 3


def test_what_does_not_go_together_is_refused() -> None:
    model = tiny().eval()
    with pytest.raises(ValueError, match=r"^assistant: expected a model with strategy"):
        check(model, strategy="assistant")
    with pytest.raises(ValueError, match=r"^strategy: expected no exact rows and temperature 0"):
        check(model, strategy="prompt_lookup", exact=True)
    with pytest.raises(ValueError, match=r"^exact: "):
        check(model, strategy="tree", exact=True)
    assert model.config._attn_implementation == "sdpa"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A random one, so large that no row that runs it says what it said."""
    model = tiny().eval()
    add_gated_lora(model, 2, 4.0)
    for name, weight in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(weight)
    save_adapter(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("strategy", ["tidar", "isd", "self_speculation"])
@pytest.mark.parametrize("exact", [False, True])
def test_an_adapter_changes_drafts_and_no_text(adapter: Path, strategy: str, exact: bool) -> None:
    options = {"strategy": strategy, "exact": exact, "mask_token_id": 20}
    model = tiny().eval()
    report = check(model, adapter=adapter, **options)
    assert has_gated_lora(model)
    assert report.equal == 3
    assert report.stages["projection"][0] > 0  # those with an adapter are compared, too
    if exact:
        assert report.equal_bits == 3
        assert not any(depending for _, depending in report.stages.values())
    assert report.forwards != check(tiny().eval(), **options).forwards


def test_an_adapter_that_runs_on_other_rows_than_masks_is_found(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be in the text to compare with, if that were decoded with the adapter, too."""
    monkeypatch.setattr(base, "lora_gate", lambda gate: lora_gate(True))
    report = check(tiny().eval(), adapter=adapter, exact=True, strategy="isd", mask_token_id=20)
    found = [each.divergence for each in report.trajectories if each.divergence is not None]
    assert found
    assert {(each.stage, each.module) for each in found} == {("projection", "layers.0.self_attn.q_proj")}


def test_an_adapter_that_does_not_fit_is_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^adapter: expected none with 'prompt_lookup'"):
        check(tiny().eval(), adapter=adapter, strategy="prompt_lookup")
    with pytest.raises(FileNotFoundError, match=r"^path: expected a folder with adapter_config"):
        check(tiny().eval(), adapter=tmp_path / "none")
