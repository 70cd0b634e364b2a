"""Gated adapters around projections that are more than a matrix: their own forward is the base, or they are refused."""

from __future__ import annotations

import copy
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils._python_dispatch import return_and_correct_aliasing

from tidar_kernels.nn.adapters import GatedLoRA, add_gated_lora, lora_gate

IN, OUT = 32, 20

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* are deprecated:UserWarning"),
]


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(IN, OUT, **options)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() + 1


class Packed(nn.Linear):
    """As bitsandbytes has it: bytes, unpacked in its own forward."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        packed = (self.weight.detach().view(-1, 2) * 100 + 128).round().to(torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, ((self.weight.to(x.dtype) - 128) / 100).view(OUT, IN), self.bias)


class Eighths(nn.Linear):
    """As FP8Linear has it: float8 with a scale."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.weight = nn.Parameter(self.weight.detach().to(torch.float8_e4m3fn))
        self.weight_scale_inv = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv, self.bias)


class Scaled(Tensor):
    """A wrapper subclass, as torchao's: it stands for twice what it holds."""

    @staticmethod
    def __new__(cls, held: Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return F.linear(x, 2 * weight.held, bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(args[0].held, *args[1:], **(kwargs or {}))
        return return_and_correct_aliasing(func, args, kwargs or {}, cls(out)) if isinstance(out, Tensor) else out


def auto_bit_linear() -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(IN, OUT, bias=False, online_quant=True)


def parametrised() -> nn.Linear:
    module = linear()
    parametrize.register_parametrization(module, "weight", Doubled())
    return module


def pruned() -> nn.Linear:
    module = linear()
    prune.l1_unstructured(module, "weight", 0.5)
    return module


def hooked() -> nn.Linear:
    module = linear()
    module.register_forward_hook(lambda module, args, out: out + 1)
    return module


def pre_hooked() -> nn.Linear:
    module = linear()
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return module


def patched() -> nn.Linear:
    module = linear()
    module.forward = types.MethodType(lambda self, x: F.linear(x, self.weight).sin(), module)  # type: ignore[method-assign]
    return module


def hooked_by_accelerate() -> nn.Linear:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Shift(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output + 3

    module = linear()
    add_hook_to_module(module, Shift())
    return module


def aligned_by_accelerate() -> nn.Linear:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    module = linear()
    add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    return module


def subclassed_weight() -> nn.Linear:
    module = linear()
    module.weight = nn.Parameter(Scaled(module.weight.detach()), requires_grad=False)
    return module


def sparse() -> nn.Linear:
    module = linear(bias=False)
    with torch.no_grad():
        module.weight.mul_(torch.rand_like(module.weight) < 0.5)
    module.weight = nn.Parameter(module.weight.detach().to_sparse_csr(), requires_grad=False)
    return module


BASES: dict[str, Callable[[], nn.Module]] = {
    "plain": linear,
    "own forward": lambda: OwnForward(IN, OUT),
    "bitnet": auto_bit_linear,
    "packed bytes": Packed,
    "float8 with a scale": Eighths,
    "parametrised": parametrised,
    "weight norm": lambda: parametrizations.weight_norm(linear()),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
    "pruned": pruned,
    "old spectral norm": lambda: nn.utils.spectral_norm(linear()).eval(),
    "hooked": hooked,
    "pre-hooked": pre_hooked,
    "patched": patched,
    "hooked by accelerate": hooked_by_accelerate,
    "aligned by accelerate": aligned_by_accelerate,
    "weight of a subclass": subclassed_weight,
    "sparse": sparse,
}
# What PyTorch or accelerate cannot do with the module alone.
UNLOADED = {"weight of a subclass", "sparse", "orthogonal"}
UNCOPIED = {"patched", "hooked by accelerate", "aligned by accelerate", "weight of a subclass", "sparse"}
UNPICKLED = UNCOPIED | {"parametrised", "weight norm", "spectral norm", "orthogonal", "hooked", "pre-hooked"}
UNPICKLED |= {"float8 with a scale"}


@pytest.fixture(params=BASES, ids=list(BASES))
def base(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return BASES[request.param]()


def adapted(base: Any, **options: Any) -> GatedLoRA:
    wrapped = GatedLoRA(base, 3, 6.0, dtype=torch.float32, **options)
    nn.init.normal_(wrapped.lora_b)
    return wrapped


@pytest.mark.parametrize("row_gate", [torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([True, False, True, False])])
def test_the_modules_own_forward_is_the_base(base: nn.Module, row_gate: Tensor) -> None:
    """Rows without the adapter have the bits of the module alone; the others its value and the adapter's term."""
    x = torch.randn(2, 4, IN)
    with torch.no_grad():
        expected = base(x)
    wrapped = adapted(base)
    assert not any(p.requires_grad for p in wrapped.base.parameters())
    x.requires_grad_(True)
    with lora_gate(row_gate):
        out = wrapped(x)
    with lora_gate(False):
        assert torch.equal(wrapped(x), expected)
    term = F.linear(F.linear(x, wrapped.lora_a) * row_gate[:, None], wrapped.lora_b) * 2.0
    assert torch.equal(out[:, row_gate == 0], expected[:, row_gate == 0])
    torch.testing.assert_close(out, expected + term)
    own = x.detach().clone().requires_grad_(True)
    grad = torch.randn_like(out)
    wrapped.base(own).backward(grad)
    got = torch.autograd.grad(out, (x, wrapped.lora_a, wrapped.lora_b), grad)
    wanted = torch.autograd.grad(term, (x, wrapped.lora_a, wrapped.lora_b), grad)
    torch.testing.assert_close(got[0], wanted[0] + own.grad)
    torch.testing.assert_close(got[1:], wanted[1:])


def test_an_adapter_of_garbage_leaves_other_rows_alone(base: nn.Module) -> None:
    x = torch.randn(4, IN)
    with torch.no_grad():
        expected = base(x)
    wrapped = adapted(base)
    with torch.no_grad():
        wrapped.lora_a.fill_(float("nan"))
    with lora_gate(torch.tensor([True, False, False, True])):
        out = wrapped(x)
    assert torch.equal(out[1:3], expected[1:3])
    assert bool(out[0].isnan().all())


def test_state_copies_and_pickles(base: nn.Module, request: pytest.FixtureRequest) -> None:
    """What the wrapped module can do alone, it can do with an adapter: a state dict, a copy, a pickle."""
    name = request.node.callspec.params["base"]
    wrapped, x = adapted(base), torch.randn(4, IN)
    assert (wrapped.in_features, wrapped.out_features) == (IN, OUT)
    assert wrapped.weight is base.weight or torch.equal(wrapped.weight, base.weight)  # type: ignore[arg-type]
    assert wrapped.bias is base.bias
    with lora_gate(torch.tensor([1.0, 0.0, 0.0, 1.0])), torch.no_grad():
        expected = wrapped(x)
        if name not in UNLOADED:
            other = adapted(BASES[name]())
            other.load_state_dict(wrapped.state_dict())
            assert torch.equal(other(x), expected)
        if name not in UNCOPIED:
            assert torch.equal(copy.deepcopy(wrapped)(x), expected)
        if name not in UNPICKLED:
            buffer = io.BytesIO()
            torch.save(wrapped, buffer)
            buffer.seek(0)
            for again in (pickle.loads(pickle.dumps(wrapped)), torch.load(buffer, weights_only=False)):
                assert torch.equal(again(x), expected)


@pytest.mark.parametrize("name", ["own forward", "hooked", "parametrised"])
def test_compiles_without_a_graph_break(name: str) -> None:
    wrapped, x, gate = adapted(BASES[name]()), torch.randn(4, IN), torch.tensor([1.0, 0.0, 0.0, 1.0])
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    with lora_gate(gate):
        assert torch.equal(compiled(x), wrapped(x))


def test_a_hook_that_comes_later_is_seen() -> None:
    wrapped, x = adapted(linear()), torch.randn(4, IN)
    with lora_gate(torch.zeros(4)):
        before = wrapped(x)
        handle = wrapped.base.register_forward_hook(lambda module, args, out: out + 1)
        assert torch.equal(wrapped(x), before + 1)
        handle.remove()
        assert torch.equal(wrapped(x), before)


class Half(nn.Module):
    def __init__(self, other: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj = linear(), linear()
        self.other = other


def peft_linear() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(nn.Sequential(linear()), peft.LoraConfig(target_modules=["0"])).base_model.model[0]


def lazy() -> nn.Module:
    return nn.LazyLinear(OUT)


def bytes_without_a_forward() -> nn.Module:
    module = linear()
    module.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.uint8), requires_grad=False)
    return module


def quantised() -> nn.Module:
    return torch.ao.nn.quantized.dynamic.Linear(IN, OUT)


def compiled() -> nn.Module:
    return torch.compile(linear(), backend="eager")


def offloaded() -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(nn.Sequential(linear()), execution_device=torch.device("cpu"))[0]


REFUSED = {
    "peft": (peft_linear, r"expected other to be an nn.Linear, got peft\.tuners\.lora\.layer\.Linear$"),
    "lazy": (lazy, r"other: expected a weight of known shape, got LazyLinear before its first call$"),
    "bytes": (bytes_without_a_forward, r"other: expected a float weight of shape \[20, 32\], got torch\.uint8"),
    "quantised": (quantised, r"expected other to be an nn.Linear, got torch\.ao\.nn\.quantized\.dynamic"),
    "compiled": (
        lambda: torch.compile(linear(), backend="eager"),
        r"expected other to be an nn.Linear, got OptimizedModule$",
    ),
    "offloaded": (offloaded, r"other: expected a weight in memory, got one that accelerate offloads$"),
    "attention": (lambda: nn.MultiheadAttention(IN, 2).out_proj, r"other: expected a module that is called"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_have_an_adapter_is_refused_before_anything_changes(case: str) -> None:
    make, message = REFUSED[case]
    model = Half(make())
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    with pytest.raises((TypeError, ValueError), match=message):
        add_gated_lora(model, 2, 4.0, ["q_proj", "other", "k_proj"])
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == frozen


def test_a_layer_that_reads_weights_instead_of_calling_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(IN, 2, batch_first=True)
    with pytest.raises(TypeError, match=r"^0\.linear1: expected a module that is called, got that of nn\.Transformer"):
        add_gated_lora(nn.Sequential(layer), 2, 4.0, ["linear1", "linear2"])
    assert all(p.requires_grad for p in layer.parameters())


def test_shards_are_refused_by_name() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = linear()
        module.weight = nn.Parameter(distribute_tensor(module.weight, init_device_mesh("cpu", (1,)), [Shard(0)]))
        with pytest.raises(TypeError, match=r"^other: expected a whole weight, got a DTensor; add adapters before"):
            add_gated_lora(Half(module), 2, 4.0, ["other"])
    finally:
        dist.destroy_process_group()


def test_a_row_invariant_base_is_a_matrix_and_nothing_else() -> None:
    model = Half(OwnForward(IN, OUT))
    with pytest.raises(TypeError, match=r"^other: expected a plain nn.Linear for row_invariant, got OwnForward$"):
        add_gated_lora(model, 2, 4.0, ["q_proj", "other"], row_invariant=True)
    assert all(p.requires_grad for p in model.parameters())
    wrapped = adapted(linear(), row_invariant=True)
    wrapped.base.register_forward_hook(lambda module, args, out: out)
    message = r"^base: expected a plain nn.Linear for row_invariant, got one with hooks"
    with pytest.raises(RuntimeError, match=message), lora_gate(True):
        wrapped(torch.randn(4, IN))


def test_a_projection_with_two_names_has_one_adapter() -> None:
    """Tied projections and shared layers: no name is left with the bare module."""
    model = Half(linear())
    model.o_proj = model.q_proj
    assert add_gated_lora(model, 2, 4.0, ["q_proj"]) == ["q_proj"]
    assert isinstance(model.q_proj, GatedLoRA)
    assert model.o_proj is model.q_proj


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": "q_proj"}, TypeError, r"^targets: expected a sequence of strings, got str$"),
        ({"targets": []}, ValueError, r"^targets: expected one or more names of modules, got none$"),
        ({"rank": 2.5}, TypeError, r"^rank: expected an int, got float$"),
        ({"rank": True}, TypeError, r"^rank: expected an int, got bool$"),
        ({"alpha": "4"}, TypeError, r"^alpha: expected a number, got str$"),
        ({"dtype": torch.int64}, TypeError, r"^dtype: expected None or a float dtype that computes, got torch.int64$"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, r"^dtype: expected None or a float dtype that computes"),
    ],
)
def test_bad_arguments_change_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Half(linear())
    with pytest.raises(error, match=message):
        add_gated_lora(model, **({"rank": 2, "alpha": 4.0, "targets": ["q_proj"]} | change))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, GatedLoRA) for module in model.modules())
