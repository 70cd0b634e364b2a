"""What frameworks do to the arguments of a module: copies, pickles, rebuilt dataclasses, casts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import tidar_kernels as tk
from tidar_kernels import Pattern, patterns

PATTERNS = [
    patterns.tidar_step(4),
    patterns.tidar_training(9, 4, [4, 5], [1, 0]),
    patterns.tree([-1, 0, 0, 2]),
    patterns.tidar_step(3).windowed(4),
    patterns.dflash_training(5, [1, 3], 2),
    Pattern(*(torch.zeros(0, *shape, dtype=torch.int32) for shape in ((2,), (2,), ())), 0),
]


def filled(pattern: Pattern) -> Pattern:
    """Everything that it can derive is there, and kept."""
    pattern.on("cpu"), pattern.on("meta"), pattern.lead_end, pattern.kept_len, pattern.causal_len
    if pattern.key_positions is not None and pattern.q_len:
        pattern.windowed(2).on("cpu")
    return pattern


def assert_equal(found: Pattern, pattern: Pattern) -> None:
    assert type(found) is type(pattern)
    for field in fields(pattern):
        one, other = getattr(found, field.name), getattr(pattern, field.name)
        assert torch.equal(one, other) if isinstance(other, Tensor) else one == other
    for derived in ("num_labels", "causal_len", "kept_len", "lead_end", "q_len"):
        assert getattr(found, derived) == getattr(pattern, derived)
    assert torch.equal(found.dense(3), pattern.dense(3))


def applied(pattern: Pattern) -> Pattern:
    from torch.distributed.utils import _apply_to_tensors

    return _apply_to_tensors(lambda x: x, {"pattern": [pattern]})["pattern"][0]  # type: ignore[no-any-return, call-overload]


def cast(pattern: Pattern) -> Pattern:
    from torch.distributed.fsdp._fully_shard._fsdp_common import _cast_fp_tensor
    from torch.distributed.utils import _apply_to_tensors

    return _apply_to_tensors(lambda x: _cast_fp_tensor(torch.bfloat16, x), (pattern,))[0]  # type: ignore[no-any-return, call-overload]


REBUILT: dict[str, Callable[[Pattern], Pattern]] = {
    "replace": replace,
    "its class": lambda pattern: type(pattern)(
        **{field.name: getattr(pattern, field.name) for field in fields(pattern)}
    ),
    "applied": applied,
    "cast": cast,
}
COPIED: dict[str, Callable[[Pattern], Pattern]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda pattern: pickle.loads(pickle.dumps(pattern)),
    "pickle 2": lambda pattern: pickle.loads(pickle.dumps(pattern, protocol=2)),
    "as a dict": lambda pattern: Pattern(**asdict(pattern)),
    "clones": lambda pattern: replace(
        pattern, **{f.name: x.clone() for f in fields(pattern) if isinstance(x := getattr(pattern, f.name), Tensor)}
    ),
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
@pytest.mark.parametrize("how", [*REBUILT, *COPIED])
def test_a_pattern_rebuilt_is_the_same(how: str, pattern: Pattern) -> None:
    for original in (pattern, filled(pattern)):
        assert_equal((REBUILT | COPIED)[how](original), pattern)


@pytest.mark.parametrize("how", REBUILT)
def test_rebuilding_does_not_copy_to_the_device_again(how: str) -> None:
    """A module under FSDP2 gets a new object in every forward pass, and must not wait for a copy in each."""
    pattern = patterns.tidar_step(4)
    copies, windowed = pattern.on("meta"), pattern.windowed(3)
    found = REBUILT[how](pattern)
    assert found is not pattern
    assert all(a is b for a, b in zip(found.on("meta"), copies, strict=True))
    assert found.windowed(3) is windowed
    later = REBUILT[how](found).on("cuda:0" if torch.cuda.is_available() else "cpu")
    assert all(a is b for a, b in zip(later, pattern.on(later[0].device), strict=True))


def test_other_fields_are_another_pattern() -> None:
    """What was derived and checked before does not hold once a field is another, or was written into."""
    pattern = filled(patterns.tidar_step(4))
    windowed = pattern.windowed(2)
    renamed = replace(pattern, name="other")
    assert renamed.windowed(2) is not windowed
    assert renamed.windowed(2).name == "other.windowed(2)"
    assert replace(pattern, predicts=torch.arange(20, dtype=torch.int32)).num_labels == 20
    with pytest.raises(ValueError, match=r"^roles: expected values of Role"):
        replace(pattern, roles=pattern.roles + 7)
    written = filled(patterns.tidar_step(4))
    written.predicts[3] = 11
    assert replace(written).num_labels == 12
    written.lead[3, 1] = 200
    with pytest.raises(ValueError, match=r"^lead: expected 0 <= lo <= hi <= kv_len = 20"):
        replace(written)


def test_what_is_derived_is_not_copied() -> None:
    pattern = patterns.tidar_step(8)
    plain = pickle.dumps(pattern)
    assert pickle.dumps(filled(pattern)) == plain
    assert copy.deepcopy(pattern).on("meta")[0] is not pattern.on("meta")[0]
    assert {field.name for field in fields(Pattern)} == {
        "lead", "own", "positions", "kv_len", "roles", "predicts", "name", "reach", "key_positions", "tree_mask",
        "window_positions",
    }  # fmt: skip


def test_a_copy_keeps_what_is_shared() -> None:
    found = copy.deepcopy(patterns.tree([-1, 0]))
    assert found.lead is found.own
    assert found.key_positions is found.positions


def test_saved_beside_a_model(tmp_path: Path) -> None:
    torch.save({"pattern": PATTERNS[1]}, tmp_path / "saved.pt")
    assert_equal(torch.load(tmp_path / "saved.pt", weights_only=False)["pattern"], PATTERNS[1])


def test_a_pattern_is_a_leaf_of_a_pytree() -> None:
    """By intention: what maps over tensors must not take its intervals apart, nor move them off the CPU."""
    pattern = PATTERNS[0]
    leaves, spec = _pytree.tree_flatten({"x": torch.ones(2), "pattern": pattern})
    assert any(leaf is pattern for leaf in leaves)
    assert _pytree.tree_unflatten(leaves, spec)["pattern"] is pattern
    moved = _pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (torch.ones(2), pattern))
    assert moved[1] is pattern


def test_to_a_device() -> None:
    """Batches of Lightning and accelerate call `to` on what has it; the fields stay, the device's copy is made."""
    pattern = patterns.tidar_step(3)
    for moved in (
        pattern.to("meta"),
        pattern.to(torch.device("meta"), non_blocking=True),
        pattern.to(device="meta", dtype=torch.bfloat16),
        pattern.to(torch.bfloat16),
    ):
        assert moved is pattern
        assert (pattern.lead.device.type, pattern.lead.dtype) == ("cpu", torch.int32)
    assert torch.device("meta") in pattern._on_device


class Layer(nn.Module):
    """A layer as users write it: the pattern is an argument of `forward`, by position or in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.seen: list[Pattern] = []

    def forward(self, x: Tensor, pattern: Pattern, given: dict[str, Any]) -> Tensor:
        assert given["pattern"].name == pattern.name
        self.seen.append(pattern)
        q, k, v = self.qkv(x).unflatten(-1, (6, 8)).transpose(1, 2).chunk(3, dim=1)
        return x + self.out(tk.attention(q, k, v, pattern).transpose(1, 2).flatten(2))


@pytest.fixture
def process_group() -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_with_mixed_precision(process_group: None) -> None:
    """Activations are cast to bfloat16, patterns are not; gradients are those of the same layers in bfloat16."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(1)
    model, pattern, x = nn.ModuleList([Layer(), Layer()]), patterns.tidar_training(10, 4), torch.randn(2, 20, 16)
    plain = copy.deepcopy(model).to(torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    pattern.on("meta")

    def loss(layers: Any, y: Tensor) -> Tensor:
        for layer in layers:
            y = layer(y, pattern, {"pattern": pattern})
        return y.float().square().mean()

    loss(model, x).backward()
    loss(plain, x.to(torch.bfloat16)).backward()
    for layer in model:
        assert layer.seen[0] is not pattern, "FSDP2 hands patterns on as they are: this test has lost its point"
        assert layer.seen[0].lead is pattern.lead
        assert layer.seen[0].on("meta")[0] is pattern.on("meta")[0]
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad.float(), rtol=0.02, atol=1e-4)
