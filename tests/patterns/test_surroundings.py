"""Inference mode and default devices: whatever is made or kept in one of them serves outside of it too."""

from __future__ import annotations

import ast
import gc
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _device

import tidar_kernels
import tidar_kernels as tk
from tests.toys import CONFIG, PROMPTS, sharp_model
from tidar_kernels import Pattern, eager, ops, patterns, strategies, testing
from tidar_kernels.decoding.exact import exact_rows
from tidar_kernels.integrations.causal import causal as causal_rows
from tidar_kernels.models.tokenizer import MASK_ID
from tidar_kernels.models.training.evaluate import evaluate_likelihood
from tidar_kernels.models.training.trainer import training_loss
from tidar_kernels.nn.rotary import RotaryEmbedding
from tidar_kernels.ops._cpu import TensorMemo
from tidar_kernels.ops.attention import cpu as attention_cpu
from tidar_kernels.ops.step_attention import cpu as step_cpu
from tidar_kernels.ops.verify import SamplingParams, sampling_tensors

PACKAGE = Path(tidar_kernels.__file__).parent

CONSTRUCTORS: dict[str, Callable[[], Pattern]] = {
    "causal": lambda: patterns.causal(5),
    "tidar_prefill": lambda: patterns.tidar_prefill(6, 3),
    "tidar_step": lambda: patterns.tidar_step(4, levels=[1, 3]),
    "tidar_training": lambda: patterns.tidar_training(11, 4, [6, 5], [2, 0]),
    "idlm_training": lambda: patterns.idlm_training(9, 4),
    "isd_step": lambda: patterns.isd_step(3, bidirectional=True, shifted=False),
    "block_diffusion_training": lambda: patterns.block_diffusion_training(9, 4),
    "set_block_training": lambda: patterns.set_block_training(9, 4),
    "block_step": lambda: patterns.block_step(4),
    "block_causal": lambda: patterns.block_causal(7, 3),
    "dflash_training": lambda: patterns.dflash_training(9, [2, 7], 3),
    "jacobi_forcing_training": lambda: patterns.jacobi_forcing_training(4, 6),
    "tree": lambda: patterns.tree([-1, 0, 0, 1, 2]),
    "packed": lambda: patterns.packed([patterns.causal(3), patterns.tree([-1, 0]), patterns.causal(9).windowed(4)]),
    "windowed": lambda: patterns.tidar_step(4).windowed(3),
    "windowed tree": lambda: patterns.tree([-1, 0, 1, 2]).windowed(2),
    "by hand": lambda: Pattern(
        *(torch.zeros(2, *shape, dtype=torch.int32, device="cpu") for shape in ((2,), (2,), ())), 0
    ),
}


def values(pattern: Pattern) -> list[Any]:
    return [getattr(pattern, field.name) for field in fields(pattern)]


def normal(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cpu", requires_grad=grad)


def operands(pattern: Pattern, grad: bool = False) -> list[Tensor]:
    rows = pattern.q_len, pattern.kv_len, pattern.kv_len
    return [normal(2, heads, n, 8, grad=grad) for heads, n in zip((4, 2, 2), rows, strict=True)]


def caches() -> tuple[Tensor, Tensor, Tensor]:
    return normal(2, 2, 40, 8), normal(2, 2, 40, 8), torch.tensor([20, 13], dtype=torch.int32, device="cpu")


def step(pattern: Pattern, **options: Any) -> Tensor:
    return ops.step_attention(*operands(pattern), *caches(), pattern, **options)


def exact_step() -> Tensor:
    pattern = patterns.tidar_step(3)
    with exact_rows(pattern):
        return step(pattern)


def trained(pattern: Pattern, attention: Callable[..., Tensor] = ops.attention, **options: Any) -> list[Tensor]:
    """Forward, and backward where gradients are on."""
    q, k, v = operands(pattern, grad=torch.is_grad_enabled())
    out = attention(q, k, v, pattern, **options)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))] if torch.is_grad_enabled() else [out]


def cached() -> list[Tensor]:
    cache = tk.KVCache(num_layers=1, batch_size=2, num_kv_heads=2, head_dim=8, max_len=12, device="cpu")
    cache.append(0, normal(2, 2, 5, 8), normal(2, 2, 5, 8))
    cache.commit(2)
    cache.compact(torch.tensor([[1, 2, -1], [0, 2, -1]], device="cpu"))
    cache.commit(torch.tensor([2, 1], dtype=torch.int32, device="cpu"), at_most=3)
    rotary = RotaryEmbedding(8, device="cpu")(torch.arange(3, device="cpu").expand(2, 3), torch.float32)
    q, k = cache.rotary_append(0, normal(2, 4, 3, 8), normal(2, 2, 3, 8), normal(2, 2, 3, 8), rotary, 2)
    return [cache.k, cache.lengths, q, k]


def judged(rule: Any) -> list[Tensor]:
    state = sampling_tensors([SamplingParams(temperature=0.8, top_k=4, repetition_penalty=1.2)] * 2, "cpu")
    drafts, at = torch.tensor([[3, 1], [2, 5]], device="cpu"), torch.tensor([4, 9], dtype=torch.int32, device="cpu")
    logits, seen = normal(2, 2, 9), torch.zeros(2, 9, dtype=torch.bool, device="cpu")
    given = {"draft_logits": normal(2, 2, 9)} if rule == "rejection" else {}
    return [
        *tk.verify(logits, drafts, at, state, rule=rule, seen=seen, **given),
        tk.sample(logits, at, state, seen=seen),
    ]


def projected() -> list[Tensor]:
    x, weight, a, b = normal(5, 16), normal(8, 16), normal(2, 16), normal(8, 2)
    gate = torch.tensor([True, False, True, True, False], device="cpu")
    return [tk.row_invariant_linear(x, weight), tk.gated_lora(x, weight, a, b, gate, 0.5)]


def decoded(**options: Any) -> Any:
    sampled = {key: options.pop(key) for key in ("temperature", "repetition_penalty") if key in options}
    options = options if {"strategy", "mode"} & set(options) else {"block_size": 4, **options}
    return tk.Decoder(MODEL, **options).generate(PROMPTS, 9, **sampled).tokens


def loss() -> list[Tensor]:
    pattern = patterns.tidar_training(13, 4)
    hidden, head = normal(1, 26, 8, grad=torch.is_grad_enabled()), normal(17, 8, grad=torch.is_grad_enabled())
    found = tk.tidar_loss(hidden, head, torch.arange(13, device="cpu")[None], pattern)
    return [found.loss, *torch.autograd.grad(found.loss, (hidden, head))] if torch.is_grad_enabled() else [found.loss]


def model_loss() -> list[Tensor]:
    found = training_loss(BYTES, torch.arange(22, device="cpu")[None], 4).loss
    return [found, *torch.autograd.grad(found, list(BYTES.parameters()))] if torch.is_grad_enabled() else [found]


def patched() -> Tensor:
    old = SimpleNamespace(rope_theta=77.0)
    from tidar_kernels.integrations import patch

    rotary = patch._rotary(6, old.rope_theta, torch.device("cpu"))
    return rotary(causal_rows(7).positions, torch.float32)[0]


def collated() -> list[Any]:
    collator = pytest.importorskip("tidar_kernels.integrations.transformers.collator")
    batch = collator.TiDARCollator(4, 39, pad_to_multiple_of=8)(
        [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": torch.arange(9, device="cpu")}]
    )
    return [batch["input_ids"], batch["labels"], collator.batch_pattern(batch).lead]


def transformed() -> list[Any]:
    found = []
    tokens = torch.tensor([[5, 6, 7, 8]], device="cpu")
    model = transformers_model()
    found.append(model(tokens).logits)
    if torch.is_grad_enabled():
        found += torch.autograd.grad(found[0].sum(), list(model.parameters()))
    found.append(tk.Decoder.from_transformers(model, block_size=4, mask_token_id=3).generate([[5, 6, 7]], 8).tokens)
    return found


_MADE: list[Any] = []


def transformers_model() -> Any:
    """Made once, outside of any mode (`outside`)."""
    if not _MADE:
        transformers = pytest.importorskip("transformers")
        import tidar_kernels.integrations.transformers  # noqa: F401

        config = transformers.Qwen3Config(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None, attn_implementation="tidar",
        )  # fmt: skip
        _MADE.append(transformers.Qwen3ForCausalLM(config).eval())
    return _MADE[0]


@pytest.fixture(autouse=True, scope="module")
def outside() -> None:
    transformers_model()


MODEL = sharp_model()
BYTES = sharp_model(replace(CONFIG, vocab_size=MASK_ID + 1, mask_token_id=MASK_ID, block_size=4))

ENTRIES: dict[str, Callable[[], Any]] = {
    **{name: lambda make=make: [*values(make()), make().dense(3)] for name, make in CONSTRUCTORS.items()},
    "draw": lambda: patterns.packed([patterns.tree([-1, 0, 0]), patterns.tidar_step(2).windowed(2)]).draw(None, 3),
    "draw much": lambda: patterns.tidar_training(300, 4).draw(),
    "testing": lambda: values(testing.irregular_pattern(9, 37, 3, 5, True)),
    "parity": lambda: testing.check_step_attention(testing.STEP_CASES[0], "cpu").failure,
    "attention": lambda: trained(patterns.tidar_training(303, 16)),
    "attention in edges": lambda: trained(patterns.block_diffusion_training(49, 8)),
    "attention capped": lambda: trained(patterns.tidar_training(47, 4), softcap=3.0, sinks=normal(4)),
    "attention eager": lambda: trained(patterns.tidar_training(45, 4), eager.attention),
    "step": lambda: step(patterns.tidar_step(5)),
    "step of a tree": lambda: step(patterns.tree([-1, 0, 0, 2, 2])),
    "step in a window": lambda: step(patterns.tidar_step(3).windowed(6), softcap=2.0, sinks=normal(4)),
    "step eager": lambda: step(patterns.tidar_step(3).windowed(6), backend="eager"),
    "exact step": exact_step,
    "cache": cached,
    "verify coupled": lambda: judged("coupled"),
    "verify rejection": lambda: judged("rejection"),
    "verify point mass": lambda: judged("point_mass"),
    "linear": projected,
    "loss": loss,
    "model's loss": model_loss,
    "decode": decoded,
    "decode one by one": lambda: decoded(mode="autoregressive"),
    "decode exactly": lambda: decoded(exact=True),
    "decode by rejection": lambda: decoded(sampling="rejection", temperature=0.7, repetition_penalty=1.1),
    "decode at levels": lambda: decoded(strategy=strategies.tidar(4, levels=[1, 3])),
    "decode isd": lambda: decoded(strategy=strategies.isd(3)),
    "decode flare": lambda: decoded(strategy=strategies.isd(3, bidirectional=True)),
    "decode a tree": lambda: decoded(strategy=strategies.tree(4)),
    "decode self-speculating": lambda: decoded(strategy=strategies.SelfSpeculation(3)),
    "decode block diffusion": lambda: decoded(strategy=strategies.BlockDiffusion(3), sampling="point_mass"),
    "plan": lambda: strategies.plan(strategies.Profile((0.9, 0.7, 0.5), (4, 20), (1.0, 1.3)), 8),
    "evaluate": lambda: evaluate_likelihood(BYTES, [bytes(range(1, 90))], 16, 4),
    "patch": patched,
    "collator": collated,
    "transformers": transformed,
}


def run(name: str) -> Any:
    torch.manual_seed(7)
    return ENTRIES[name]()


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.device == expected.device
        assert torch.equal(found, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def inference_tensors() -> dict[int, Tensor]:
    gc.collect()
    return {id(x): x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.is_inference()}


def test_no_inference_tensor_outlives_its_call() -> None:
    """Whatever is kept of a call, it is no inference tensor: the only ones that a later training step cannot use."""
    before = inference_tensors()
    with torch.inference_mode():
        for name in ENTRIES:
            run(name)
    after = [x for key, x in inference_tensors().items() if key not in before]
    assert not after, [type(owner) for owner in gc.get_referrers(after[0])]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_first_call_in_inference_mode_changes_nothing(name: str) -> None:
    with torch.inference_mode():
        run(name)
    assert_same(run(name), run(name))


@pytest.fixture
def meta() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_default_device_changes_nothing(name: str, request: pytest.FixtureRequest) -> None:
    """First under the default device, where memos are filled, and then without."""
    request.getfixturevalue("meta")
    found = run(name)
    with torch.device("cpu"), torch.device("meta"):
        assert_same(run(name), found)
    torch.set_default_device(None)
    assert_same(found, run(name))


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_patterns_made_in_inference_mode_train(name: str) -> None:
    """Fields, copies and windows are ordinary tensors, and gradients are those of a pattern made outside."""
    with torch.inference_mode():
        pattern = CONSTRUCTORS[name]()
        kept = [*values(pattern), *pattern.rows_on("cpu"), *pattern.on("cpu"), pattern.dense(2)]
    assert not any(x.is_inference() for x in kept if isinstance(x, Tensor))
    torch.manual_seed(3)
    found = trained(pattern, backend="eager")
    torch.manual_seed(3)
    assert_same(found, trained(CONSTRUCTORS[name](), backend="eager"))


def test_a_pattern_of_inference_tensors() -> None:
    """One copy of each, also of a tensor that serves two fields."""
    with torch.inference_mode():
        nothing, at = (
            torch.zeros(3, 2, dtype=torch.int32, device="cpu"),
            torch.arange(3, dtype=torch.int32, device="cpu"),
        )
    pattern = Pattern(nothing, nothing, at, 3)
    assert pattern.lead is pattern.own
    assert pattern.key_positions is pattern.positions
    assert not pattern.lead.is_inference()


def test_training_after_an_evaluation_in_a_compiled_graph() -> None:
    pattern = patterns.tidar_training(19, 4)
    q, k, v = operands(pattern)

    def forward(q: Tensor) -> Tensor:
        return ops.attention(q, k, v, pattern).sum()

    with torch.inference_mode():
        expected = forward(q)
        compiled = torch.compile(forward, backend="aot_eager")
        compiled(q)
    leaf = q.detach().clone().requires_grad_()
    found = compiled(leaf)
    found.backward()
    assert torch.equal(found, expected)
    leaf_of_eager = q.detach().clone().requires_grad_()
    forward(leaf_of_eager).backward()
    assert_same(leaf.grad, leaf_of_eager.grad)


@pytest.mark.parametrize("make", [lambda: strategies.tidar(4), lambda: strategies.isd(3), lambda: strategies.tree(4)])
def test_tables_of_strategies_made_in_inference_mode(make: Callable[[], Any]) -> None:
    """They index logits, and gradients may flow through those when the strategy is used again."""
    with torch.inference_mode():
        strategy = make()
        decoded(strategy=strategy)
    tables = [table for kept in strategy._on_device.values() for table in kept]
    assert tables
    assert not any(table.is_inference() for table in tables)


def test_a_cache_made_in_inference_mode_is_written_outside() -> None:
    with torch.inference_mode():
        cache = tk.KVCache(num_layers=1, batch_size=1, num_kv_heads=1, head_dim=8, max_len=4)
        cache.append(0, normal(1, 1, 2, 8), normal(1, 1, 2, 8))
        cache.commit(1)
    new = normal(1, 1, 2, 8)
    cache.append(0, new, new)
    cache.commit(torch.tensor([2]), at_most=2)
    assert torch.equal(cache.k[0, :, :, 1:3], new)
    assert cache.lengths.tolist() == [3]


# What the CPU paths keep.


def test_what_is_kept_follows_its_tensors() -> None:
    memo, count = TensorMemo(), iter(range(100))
    a, b, c = (torch.zeros(2, device="cpu") for _ in range(3))

    def get(*tensors: Tensor | None, key: str = "key") -> int:
        return memo.get(key, lambda: next(count), *tensors)  # type: ignore[arg-type]

    assert (get(a, b), get(a, b), get(a, b, key="other")) == (0, 0, 1)
    assert (get(a, c), get(a, None), get(a, None)) == (2, 3, 3)
    a.add_(1)
    assert (get(a, None), get(a, a)) == (4, 5)
    with torch.inference_mode():
        unversioned = torch.zeros(2, device="cpu")
        assert get(a, a) == 5
        assert get(a, a, key="made inside") == 6
    assert (get(unversioned), get(unversioned), get(a, unversioned)) == (7, 8, 9)
    assert (len(memo._kept), get(a, a)) == (1, 5)
    del a
    gc.collect()
    assert len(memo._kept) == 0, "a tensor beside itself must not keep itself alive"


def test_masks_and_plans_see_writes() -> None:
    """Whoever writes into the intervals of an operator's call gets what they say now, in inference mode too."""
    for inference in (False, True):
        with torch.inference_mode(inference):
            pattern = patterns.causal(6)
            lead, own = pattern.lead.clone(), pattern.own.clone()
            q, k, v = operands(pattern)
            for row in range(2):
                expected = eager.attention(q, k, v, Pattern(lead.clone(), own.clone(), pattern.positions, 6))
                found, _ = torch.ops.tidar_kernels.attention(q, k, v, lead, own, 8**-0.5)
                torch.testing.assert_close(found, expected)
                before = step_cpu._packed_mask(lead, own, None, 6, torch.float32, 1)[0].clone()
                lead[3 + row, 1] = 1
                assert not torch.equal(step_cpu._packed_mask(lead, own, None, 6, torch.float32, 1)[0], before)
    assert not any(x.is_inference() for x in attention_cpu._plans._kept)


# What a default device may decide.

FACTORIES = {factory.__name__ for factory in _device._device_constructors()}
# Parameters, which follow PyTorch's default device as those of its own modules do.
FOLLOW = {("nn/attention.py", "ones")}


def test_every_tensor_says_where_it_is() -> None:
    """No tensor of the package is made where the default device says, but parameters."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        placed = {
            id(call.func)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call) and {None, "device"} & {keyword.arg for keyword in call.keywords}
        }
        for node in ast.walk(tree):
            of_torch = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
            if of_torch and node.attr in FACTORIES and id(node) not in placed:
                found.add((str(path.relative_to(PACKAGE)), node.attr))
    assert found == FOLLOW
    assert {"arange", "zeros", "tensor", "as_tensor", "empty"} <= FACTORIES
