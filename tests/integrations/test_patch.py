"""tk.patch: attention of a model that knows nothing of patterns, through TiDARAttention over the same weights."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tidar_kernels as tk
from tidar_kernels.integrations.patch import PatchedAttention
from tidar_kernels.patterns import Pattern

VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, THETA = 23, 24, 4, 2, 6, 500.0


def rotate(x: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary positions as the paper writes them, pair by pair; `x [batch, heads, rows, dim]`."""
    pairs = x.shape[-1] // 2
    angle = positions[:, None].double() * THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :pairs], x[..., pairs:])
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


class Attention(nn.Module):
    """Causal attention as people write it. `mask` and `positions` are for the tests' reference alone."""

    def __init__(self, *, bias: bool = False, norm: bool = False, rope: str = "half", scale: float = 1.0) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.rope, self.scale = HEADS, KV_HEADS, rope, scale
        self.q_proj = nn.Linear(HIDDEN, HEADS * DIM, bias=bias)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=bias)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=bias)
        self.o_proj = nn.Linear(HEADS * DIM, HIDDEN, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(DIM), nn.RMSNorm(DIM)) if norm else (None, None)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, positions: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, DIM)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.rope != "none":
            positions = torch.arange(x.shape[1]) if positions is None else positions
            q, k = (rotate(t, positions, self.rope == "interleaved") for t in (q, k))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=self.scale * DIM**-0.5, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers of it, a little head: `model(tokens)` gives hidden states."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attention": Attention(**options), "mlp": nn.Linear(HIDDEN, HIDDEN)}) for _ in range(2)
        )
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor, **attention: Any) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer["attention"](x, **attention)
            x = x + F.silu(layer["mlp"](x))
        return x


def patched(model: nn.Module, **options: Any) -> nn.Module:
    twin = copy.deepcopy(model)
    assert tk.patch(twin, **{"rope_theta": THETA} | options) == ["layers.0.attention", "layers.1.attention"]
    return twin


@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"norm": True}, {"rope": "none"}], ids=["plain", "bias", "norm", "unrotated"]
)
def test_outputs_and_gradients_are_the_models_own(options: dict[str, Any]) -> None:
    """Causally without a pattern; with one, as the plain module under that mask and those positions."""
    model = Model(**options).double()
    twin = patched(model, rope_theta=None if options.get("rope") == "none" else THETA)
    pattern = tk.patterns.tidar_training(9, 4, [5, 4], [2, 0])
    assert list(twin.state_dict()) == list(model.state_dict())
    for rows, mask in ((14, None), (pattern.q_len, pattern)):
        tokens, weights = torch.randint(0, VOCAB, (2, rows)), torch.randn(2, rows, HIDDEN, dtype=torch.float64)
        if mask is None:
            expected, got = model(tokens), twin(tokens)
        else:
            expected = model(tokens, mask=mask.dense(), positions=mask.positions)
            with tk.use_pattern(mask):
                got = twin(tokens)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        for out, owner in ((expected, model), (got, twin)):
            owner.zero_grad()
            (out * weights).sum().backward()
        for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_weights_are_the_same_objects() -> None:
    model = Model()
    before = dict(model.named_parameters())
    tk.patch(model, rope_theta=THETA)
    assert all(isinstance(layer["attention"], PatchedAttention) for layer in model.layers)
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)


class Adapter(nn.Module):
    """A patched model as tk.Decoder asks for one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = SimpleNamespace(vocab_size=VOCAB, num_layers=2, num_kv_heads=KV_HEADS, head_dim=DIM)

    def forward(self, tokens: Tensor, pattern: Pattern, cache: tk.KVCache | None = None) -> Tensor:
        with tk.use_pattern(pattern, cache):
            return self.model(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)


def test_a_patched_model_decodes_what_it_decoded_before() -> None:
    model = Model(norm=True).eval()
    prompt, expected = [3, 1, 4, 1, 5], []
    with torch.no_grad():
        for layer in model.layers:  # attention with a say in the tokens
            layer["attention"].q_norm.weight.mul_(5)
            layer["attention"].o_proj.weight.mul_(5)
        for _ in range(20):
            expected.append(int(model.head(model(torch.tensor([prompt + expected])))[0, -1].argmax()))
    assert len(set(expected)) > 4
    decoder = tk.Decoder(Adapter(patched(model)), block_size=4, mask_token_id=VOCAB - 1)
    assert decoder.generate([prompt], max_new_tokens=20).tokens == [expected]


class Fused(nn.Module):
    """One projection for q, k and v, other names, a tuple returned, a table and a mask in the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * DIM)
        self.out = nn.Linear(HEADS * DIM, HIDDEN)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        q, k = rotate(q, positions), rotate(k, positions)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(out.transpose(1, 2).flatten(2)), None


def test_fused_projections_other_names_and_arguments() -> None:
    names = {"qkv": "qkv", "o": "out"}
    model = nn.ModuleDict({"block": Fused()})
    old, x = model["block"], torch.randn(1, 7, HIDDEN)
    with pytest.raises(ValueError, match=r"^model\.block: expected to be called as module\(x\) .*'positions'"):
        tk.patch(model, rope_theta=THETA, names=names)
    assert model["block"] is old
    tk.patch(
        model,
        rope_theta=THETA,
        names=names,
        ignore=["positions"],
        call=lambda module, x: module(x, torch.arange(x.shape[1])),
    )
    positions = torch.arange(7)
    out, none = model["block"](x, positions)
    torch.testing.assert_close(out, old(x, positions)[0])
    assert none is None
    model["block"](x, positions, None)
    with pytest.raises(
        ValueError, match=r"^mask: expected None, for a patched module attends by use_pattern, got Tensor"
    ):
        model["block"](x, positions, torch.ones(7, 7, dtype=torch.bool))


def other(**changes: Any) -> Model:
    model = Model(**{k: v for k, v in changes.items() if k in ("rope", "scale", "norm")})
    for name, value in changes.items():
        if name not in ("rope", "scale", "norm"):
            setattr(model.layers[1]["attention"], name, value)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: other(rope="interleaved"), {}),
        (lambda: other(scale=0.5), {}),
        (lambda: other(), {"rope_theta": None}),
        (lambda: other(), {"rope_theta": 10 * THETA}),
        (lambda: other(rope="none"), {}),
        (lambda: faint(), {"rope_theta": 10 * THETA}),
        (lambda: other(), {"num_heads": 2 * HEADS, "num_kv_heads": 2 * KV_HEADS, "head_dim": DIM // 2}),
    ],
    ids=["interleaved", "scale", "no-rotation", "other-theta", "rotation", "faint-weights", "other-heads"],
)
def test_a_module_that_computes_something_else_is_named(
    model: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = model().to(dtype)
    before = [layer["attention"] for layer in model.layers]
    if "head_dim" in options and (DIM // 2) % 2:
        options = options | {"rope_theta": None}
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.attention: expected causal attention with"):
        tk.patch(model, **{"rope_theta": THETA} | options)
    assert [layer["attention"] for layer in model.layers] == before


def faint() -> Model:
    """Freshly initialised as large models are: scores of almost nothing, which hide the rotation."""
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.02)
    return model


def no_projections() -> nn.Module:
    return nn.ModuleDict({"mlp": nn.Linear(3, 3)})


def shared() -> nn.Module:
    model = Model()
    model.layers[1]["attention"] = model.layers[0]["attention"]
    return model


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: "model", {}, TypeError, r"^model: expected a torch\.nn\.Module, got str"),
        (no_projections, {}, ValueError, r"^model: expected modules with q_proj, k_proj, v_proj, o_proj in it"),
        (Model, {"names": {"q": "q_proj"}}, TypeError, r"^names: expected the keys q, k, v, o or qkv, o, got q"),
        (shared, {}, ValueError, r"^model\.layers\.1\.attention: expected an attention module of its own, got that of"),
        (lambda: other(n_heads=None), {}, ValueError, r"^num_heads: expected it or head_dim, got no attribute"),
        (lambda: other(n_heads=5), {}, ValueError, r"^model\.layers\.1\.attention: expected 5 heads, 2 kv_heads"),
        (lambda: other(sinks=nn.Parameter(torch.zeros(4))), {}, ValueError, r"no parameters besides .* got sinks$"),
        (lambda: other(dropout=0.1), {}, ValueError, r"^model\.layers\.1\.attention: expected no dropout, got 0\.1"),
    ],
)  # fmt: skip
def test_what_cannot_be_patched_is_refused_and_left_alone(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = model()
    before = list(model.modules()) if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message):
        tk.patch(model, **{"rope_theta": THETA} | options)
    assert before == (list(model.modules()) if isinstance(model, nn.Module) else [])


def test_patterns_are_checked_and_end_with_their_block() -> None:
    model, tokens = patched(Model()), torch.randint(0, VOCAB, (1, 8))
    with pytest.raises(TypeError, match=r"^pattern: expected a tidar_kernels\.Pattern, got int"), tk.use_pattern(8):
        pass
    bad_cache = tk.use_pattern(tk.patterns.causal(8), {})
    with pytest.raises(TypeError, match=r"^cache: expected a tidar_kernels\.KVCache, got dict"), bad_cache:
        pass
    with tk.use_pattern(tk.patterns.causal(9)), pytest.raises(ValueError, match=r"^x: expected 9 rows for causal"):
        model(tokens)
    expected = model(tokens)
    with tk.use_pattern(tk.patterns.tidar_training(4, 2)):
        assert not torch.allclose(model(tokens), expected)
    assert torch.equal(model(tokens), expected)
