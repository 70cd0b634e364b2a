"""Every argument of every public callable, given what it does not take: a result, or an error that names the argument.

A callable is a line of `CALLS`, with arguments that it takes; one that is public and has no line fails a test.
"""

from __future__ import annotations

import inspect
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tidar_kernels as tk
from tests.toys import CONFIG
from tidar_kernels import models, patterns, strategies
from tidar_kernels.models import Transformer, TransformerConfig

Call = tuple[Callable[..., Any], dict[str, Any]]
JUNK: dict[str, Any] = {
    "None": None, "text": "x", "bytes": b"q", "an object": object(), "a function": lambda *_: 3,
    "a dtype": torch.float32, "True": True, "-1": -1, "2**70": 2**70, "1.5": 1.5, "nan": float("nan"), "-0.0": -0.0,
    "[]": [], "[1]": [1], "[None]": [None], "[[1]]": [[1]], "['a', 2]": ["a", 2], "7 ints": (1, 2, 3, 4, 5, 6, 7),
    "{}": {}, "a float tensor": torch.tensor([1.5]), "an empty tensor": torch.zeros(0), "a scalar": torch.tensor(3),
    "five dimensions": torch.zeros(2, 2, 2, 2, 2), "a complex tensor": torch.zeros(3, dtype=torch.complex64),
    "a meta tensor": torch.empty(2, device="meta"),
}  # fmt: skip
ROWS = 3
PROFILE = strategies.Profile((0.5,), (1, 4), (1.0, 2.0))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ints(*values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def operands(*names: str, **more: Any) -> dict[str, Any]:
    """What operators take, of a batch of two with two KV heads."""
    rows, slots = (2, 2, ROWS, 16), (2, 2, 12, 16)
    every = {
        "q": randn(2, 4, ROWS, 16), "k": randn(*rows), "v": randn(*rows),
        "k_cache": randn(*slots), "v_cache": randn(*slots), "lengths": ints(2, 5),
    }  # fmt: skip
    return {name: every[name] for name in names} | more


def rotary(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(batch, ROWS, 1, 16), randn(batch, ROWS, 1, 16)


def cache(page_size: int | None = None) -> tk.KVCache:
    return tk.KVCache(num_layers=2, batch_size=2, num_kv_heads=2, head_dim=16, max_len=12, page_size=page_size)


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG)


def adapted() -> Transformer:
    made = model()
    tk.add_gated_lora(made, 2, 4.0, ("q_proj",))
    return made


class Attentive(torch.nn.Module):
    """A model with one layer of causal attention without positions, as `tk.patch` finds it."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o_proj(out.transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        self.attention = self.Attention()


def checkpoint() -> str:
    path = f"{tempfile.mkdtemp()}/model.safetensors"
    models.save_checkpoint(model(), path)
    return path


def defaults(function: Callable[..., Any], **given: Any) -> dict[str, Any]:
    """Every argument that has a default, with it, and what is given."""
    known = inspect.signature(function).parameters
    return {n: p.default for n, p in known.items() if p.default is not p.empty and p.kind is not p.VAR_KEYWORD} | given


def stepping() -> tk.Decoder:
    decoder = tk.Decoder(model(), 2)
    decoder.add([1, 2, 3])
    return decoder


def consumed(decoder: tk.Decoder) -> Callable[..., Any]:
    return lambda *args, **more: next(decoder.stream(*args, **more))


def gated(module: torch.nn.Module) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        with tk.lora_gate(True):
            return module(**arguments)

    return call


def entered(context: Callable[..., Any]) -> Callable[..., Any]:
    def enter(**arguments: Any) -> None:
        with context(**arguments):
            pass

    return enter


CAUSAL = patterns.causal(ROWS)
SCORES = {"scale": 0.2, "softcap": 3.0, "sinks": randn(4)}
PAGED = {"block_table": None, "k_scale": None, "v_scale": None, "backend": None}
FIELDS = {name: getattr(CAUSAL, name) for name in ("lead", "own", "positions", "kv_len")}
RAGGED_ROTARY = (randn(ROWS, 1, 16), randn(ROWS, 1, 16))
RAGGED = {name: randn(ROWS, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
PATH = ints([0, 1], [0, 2])
LINEAR = {"x": randn(3, 8), "weight": randn(6, 8), "bias": randn(6)}
LORA = {"lora_a": randn(2, 8), "lora_b": randn(6, 2), "gate": torch.tensor([True, False, True]), "scale": 1.0}
LOGITS = {"positions": ints(4, 9), "params": tk.SamplingParams(0.7, 5)}
DOCUMENTS = {"seq_len": 6, "block_size": 2, "document_lengths": [2, 4]}
PROMPT = {"input_ids": [[1, 2, 3]], "max_new_tokens": 2}
BATCH = {"patterns": [CAUSAL, None], "rows": [3, 0], "num_rows": 4, "table": [CAUSAL], "device": "cpu"}

# What a public name is called with. Made anew for each call: some change what they are given.
CALLS: dict[str, Callable[[], Call]] = {
    "attention": lambda: (tk.attention, operands("q", "k", "v", pattern=CAUSAL, **SCORES, backend=None)),
    "step_attention": lambda: (
        tk.step_attention,
        operands(
            *("q", "k", "v", "k_cache", "v_cache", "lengths"),
            pattern=CAUSAL, scale=0.2, max_context=6, softcap=3.0, sinks=randn(4), backend=None,
            block_table=None, k_scale=None, v_scale=None, out=None,
        ),
    ),
    "append_kv": lambda: (
        tk.append_kv,
        operands("k_cache", "v_cache", "k", "v", "lengths", **PAGED),
    ),
    "compact_kv": lambda: (
        tk.compact_kv, operands("k_cache", "v_cache", "lengths", path=PATH, **PAGED)
    ),
    "rotary_append": lambda: (
        tk.rotary_append,
        operands(
            *("q", "k", "v", "k_cache", "v_cache", "lengths"), rotary=rotary(), keep=2, **PAGED
        ),
    ),
    "sample": lambda: (tk.sample, {"logits": randn(2, 3, 30), "seen": None, "backend": None, **LOGITS}),
    "verify": lambda: (
        tk.verify,
        {"logits": randn(2, 3, 30), "drafts": ints([1, 2, 3], [3, 4, 5], dtype=torch.int64), **LOGITS}
        | {"rule": "coupled", "draft_logits": None, "mix": None, "beta": 1.0, "seen": None, "backend": None},
    ),
    "row_invariant_linear": lambda: (tk.row_invariant_linear, {**LINEAR, "backend": None}),
    "gated_lora": lambda: (tk.gated_lora, {**LINEAR, **LORA, "backend": None}),
    "SamplingParams": lambda: (tk.SamplingParams, defaults(tk.SamplingParams)),
    "KVCache": lambda: (
        tk.KVCache,
        {"num_layers": 2, "batch_size": 2, "num_kv_heads": 2, "head_dim": 16, "max_len": 12, "dtype": torch.float32}
        | {"device": "cpu", "page_size": 4, "num_pages": 8},
    ),
    "KVCache.layer": lambda: (cache().layer, {"index": 0}),
    "KVCache.options": lambda: (cache(4).options, {"index": 0}),
    "KVCache.sequence": lambda: (cache().sequence, {"index": 0}),
    "KVCache.check_room": lambda: (cache().check_room, {"num_tokens": 2}),
    "KVCache.pages_for": lambda: (cache(4).pages_for, {"num_tokens": 2}),
    "KVCache.reserve": lambda: (cache(4).reserve, {"sequence": 0, "num_tokens": 5}),
    "KVCache.release": lambda: (cache(4).release, {"sequence": 0}),
    "KVCache.reading": lambda: (lambda lengths: cache().reading(lengths).__enter__(), {"lengths": ints(0, 0)}),
    "KVCache.share": lambda: (cache(4).share, {"sequence": 1, "of": 0, "num_tokens": 0}),
    "KVCache.pages_of": lambda: (cache(4).pages_of, {"sequence": 0}),
    "KVCache.append": lambda: (cache().append, operands("k", "v", layer=0)),
    "KVCache.rotary_append": lambda: (
        cache().rotary_append, operands("q", "k", "v", layer=0, rotary=rotary(), keep=2)
    ),
    "KVCache.commit": lambda: (cache().commit, {"accepted": ints(1, 2), "at_most": 3}),
    "KVCache.compact": lambda: (cache().compact, {"path": PATH}),
    "KVCache.lengths_known": lambda: (cache().lengths_known, {"lengths": [0, 0]}),
    "Pattern": lambda: (tk.Pattern, dict(**FIELDS)),
    "Pattern.windowed": lambda: (CAUSAL.windowed, {"window": 2}),
    "Pattern.subset": lambda: (CAUSAL.subset, {"rows": ints(0, 2, dtype=torch.int64)}),
    "Pattern.dense": lambda: (CAUSAL.dense, {"context_len": 2}),
    "Pattern.draw": lambda: (CAUSAL.draw, {"context_len": 2}),
    "Pattern.on": lambda: (CAUSAL.on, {"device": "cpu"}),
    "Pattern.rows_on": lambda: (CAUSAL.rows_on, {"device": "cpu"}),
    "Pattern.reach_on": lambda: (CAUSAL.reach_on, {"device": "cpu"}),
    "Pattern.bits_on": lambda: (CAUSAL.bits_on, {"device": "cpu"}),
    "patterns.PatternBatch": lambda: (
        patterns.PatternBatch,
        {"patterns": (CAUSAL,), "kinds": ints(0, 0), "cu_rows": ints(0, 3, 3), "num_rows": 3},
    ),
    "patterns.PatternBatch.positions": lambda: (patterns.batch([CAUSAL, None]).positions, {"lengths": ints(1, 2)}),
    "patterns.PatternBatch.pattern": lambda: (patterns.batch([CAUSAL, None]).pattern, {"request": 0}),
    "patterns.PatternBatch.dense": lambda: (patterns.batch([CAUSAL, None]).dense, {"context_lens": [1, 2]}),
    "patterns.PatternBatch.windowed": lambda: (patterns.batch([CAUSAL, None]).windowed, {"window": 2}),
    "patterns.PatternBatch.copy_": lambda: (patterns.batch([CAUSAL]).copy_, {"other": patterns.batch([CAUSAL])}),
    "patterns.batch": lambda: (patterns.batch, dict(BATCH)),
    "patterns.block_causal": lambda: (patterns.block_causal, {"length": 6, "block_size": 2}),
    "patterns.block_diffusion_training": lambda: (patterns.block_diffusion_training, {"seq_len": 6, "block_size": 2}),
    "patterns.block_step": lambda: (patterns.block_step, {"length": 4, "shared_window": True}),
    "patterns.causal": lambda: (patterns.causal, {"length": 4}),
    "patterns.check_int": lambda: (lambda value: patterns.check_int("value", value, 0), {"value": 3}),
    "patterns.dflash_training": lambda: (
        patterns.dflash_training, {"context_len": 8, "anchors": [1, 4], "block_size": 2}
    ),
    "patterns.idlm_training": lambda: (patterns.idlm_training, dict(DOCUMENTS)),
    "patterns.isd_step": lambda: (patterns.isd_step, {"stride": 3, "bidirectional": True, "shifted": True}),
    "patterns.jacobi_forcing_training": lambda: (
        patterns.jacobi_forcing_training, {"prompt_len": 3, "response_len": 4}
    ),
    "patterns.packed": lambda: (patterns.packed, {"patterns": [CAUSAL, CAUSAL]}),
    "patterns.set_block_training": lambda: (patterns.set_block_training, {"seq_len": 6, "block_size": 2}),
    "patterns.tidar_prefill": lambda: (patterns.tidar_prefill, {"prompt_len": 5, "block_size": 2}),
    "patterns.tidar_step": lambda: (patterns.tidar_step, {"block_size": 3, "bidirectional": True, "levels": [1, 2]}),
    "patterns.tidar_training": lambda: (patterns.tidar_training, {**DOCUMENTS, "prompt_lengths": [0, 1]}),
    "patterns.tree": lambda: (patterns.tree, {"parents": [-1, 0, 0]}),
    "Decoder": lambda: (tk.Decoder, defaults(tk.Decoder, model=model(), block_size=2, batch_size=2, max_len=16)),
    "Decoder.generate": lambda: (tk.Decoder(model(), 2).generate, dict(**PROMPT)),
    "Decoder.stream": lambda: (consumed(tk.Decoder(model(), 2)), dict(**PROMPT)),
    "Decoder.add": lambda: (tk.Decoder(model(), 2).add, {"prompt": [1, 2, 3], "max_new_tokens": 2, "params": None}),
    "Decoder.remove": lambda: (stepping().remove, {"request_id": 0}),
    "Session": lambda: (
        tk.Session, defaults(tk.Session, model=model(), step=tk.Decoder(model(), 2)._step, batch_size=2, max_len=16)
    ),
    "Session.check": lambda: (stepping()._session.check, {"prompt": [1, 2], "max_new_tokens": 3, "stop_tokens": ()}),
    "Session.add": lambda: (stepping()._session.add, defaults(tk.Session.add, prompt=[1, 2], max_new_tokens=3)),
    "Session.remove": lambda: (stepping()._session.remove, {"request_id": 0}),
    "GatedLoRA": lambda: (
        tk.GatedLoRA, defaults(tk.GatedLoRA, linear=torch.nn.Linear(8, 6), rank=2, alpha=4.0)
    ),
    "GatedLoRA.forward": lambda: (gated(tk.GatedLoRA(torch.nn.Linear(8, 6), 2, 4.0)), {"x": randn(3, 8)}),
    "TiDARAttention": lambda: (tk.TiDARAttention, defaults(tk.TiDARAttention, hidden_size=32, num_heads=4)),
    "TiDARAttention.forward": lambda: (
        tk.TiDARAttention(32, 4, 2, 16),
        {"x": randn(2, ROWS, 32), "pattern": CAUSAL, "rotary": rotary(), "cache": None},
    ),
    "add_gated_lora": lambda: (
        tk.add_gated_lora,
        {"model": model(), "rank": 2, "alpha": 4.0, "targets": ("q_proj",), "use_rslora": False, "dtype": None},
    ),
    "load_peft_adapter": lambda: (tk.load_peft_adapter, {"model": model(), "path": "nowhere"}),
    "lora_gate": lambda: (entered(tk.lora_gate), {"gate": True}),
    "use_pattern": lambda: (entered(tk.use_pattern), {"pattern": CAUSAL, "cache": None}),
    "tidar_loss": lambda: (
        tk.tidar_loss,
        defaults(
            tk.tidar_loss,
            hidden=randn(1, 12, 8), head=randn(30, 8), tokens=ints([1, 2, 3, 4, 5, 6], dtype=torch.int64),
            pattern=patterns.tidar_training(6, 2),
        ),
    ),
    "append_kv (ragged)": lambda: (
        tk.append_kv, operands("k_cache", "v_cache", "lengths", k=RAGGED["k"], v=RAGGED["v"], cu_rows=ints(0, 1, 3))
    ),
    "rotary_append (ragged)": lambda: (
        tk.rotary_append,
        operands(
            *("k_cache", "v_cache", "lengths"), **RAGGED, rotary=RAGGED_ROTARY, keep=ints(1, 2), cu_rows=ints(0, 1, 3)
        ),
    ),
    "save_adapter": lambda: (tk.save_adapter, {"model": adapted(), "path": tempfile.mkdtemp(), "base_model": "base"}),
    "strategies.BlockDiffusion": lambda: (strategies.BlockDiffusion, defaults(strategies.BlockDiffusion, length=4)),
    "strategies.SelfSpeculation": lambda: (strategies.SelfSpeculation, defaults(strategies.SelfSpeculation, length=4)),
    "strategies.Tree": lambda: (strategies.Tree, {"paths": [[0], [0, 0]]}),
    "strategies.Adaptive": lambda: (strategies.Adaptive, {"profile": PROFILE, "max_block_size": 3}),
    "strategies.adaptive": lambda: (strategies.adaptive, {"profile": PROFILE, "max_block_size": 3}),
    "strategies.Profile": lambda: (strategies.Profile, dict(vars(PROFILE))),
    "strategies.auto": lambda: (strategies.auto, {"profile": PROFILE, "max_block_size": 2}),
    "strategies.plan": lambda: (strategies.plan, {"profile": PROFILE, "max_block_size": 2}),
    "strategies.by_name": lambda: (strategies.by_name, {"name": "isd", "drafts": 3, "shifted": True}),
    "strategies.class_of": lambda: (strategies.class_of, {"name": "isd"}),
    "strategies.isd": lambda: (strategies.isd, defaults(strategies.isd, stride=3)),
    "strategies.tidar": lambda: (strategies.tidar, defaults(strategies.tidar, block_size=3)),
    "strategies.tree": lambda: (strategies.tree, {"shape": [2, 1]}),
    "models.TransformerConfig": lambda: (TransformerConfig, vars(CONFIG) | {}),
    "models.Transformer": lambda: (Transformer, {"config": CONFIG}),
    "models.load_checkpoint": lambda: (models.load_checkpoint, {"path": checkpoint(), "dtype": None, "device": "cpu"}),
    "models.save_checkpoint": lambda: (
        models.save_checkpoint, defaults(models.save_checkpoint, model=model(), path=f"{tempfile.mkdtemp()}/m")
    ),
    "models.load_shipped": lambda: (models.load_shipped, {"dtype": torch.float32, "device": "cpu"}),
    "models.load_shipped_adapter": lambda: (models.load_shipped_adapter, {"model": models.load_shipped()[0]}),
    "patch": lambda: (tk.patch, defaults(tk.patch, model=Attentive(), rope_theta=None, num_heads=2)),
}  # fmt: skip

ALSO = {  # names of what the argument becomes, which users know
    "strategies.by_name": ("strategy", "stride"),
    "strategies.class_of": ("strategy",),
    "strategies.tree": ("paths",),
}
# Not here: results and enumerations, whose fields nobody passes, and what takes the arguments of `torch.nn.Module.to`.
ELSEWHERE = {
    "GenerationResult",
    "TiDARLoss",
    "Pattern.to",
    "patterns.PatternBatch.to",
    "patterns.PatternTable",
    "patterns.Role",
    "models.ByteTokenizer",
    "models.tensor_parallel",  # of a mesh of processes: tests/distributed
    "models.shipped_figures",
    "strategies.autoregressive",
    *(f"strategies.{name}" for name in ("Batch", "DecoderModel", "Drafting", "StepResult", "Strategy", "StrategyName")),
    "strategies.Plan",
}


def public() -> Iterator[str]:
    """Names of the public callables, methods included."""
    for prefix, room in (("", tk), ("patterns.", patterns), ("strategies.", strategies), ("models.", models)):
        for name in room.__all__:
            value = getattr(room, name)
            if not callable(value) or (prefix and name in tk.__all__):
                continue
            yield prefix + name
            if inspect.isclass(value) and prefix in ("", "patterns."):  # those of strategies are for the session
                for method, function in vars(value).items():
                    if (
                        inspect.isfunction(function)
                        and not method.startswith("_")
                        and len(inspect.signature(function).parameters) > 1
                    ):
                        yield f"{prefix}{name}.{method}"


def test_every_public_callable_has_a_line() -> None:
    assert set(public()) - ELSEWHERE - {name.partition(" (")[0] for name in CALLS} == set()


def called(name: str) -> Call:
    """What a line says, with the arguments that it leaves out at their defaults."""
    function, arguments = CALLS[name]()
    of: Any = tk
    for part in name.partition(" (")[0].split("."):
        of = getattr(of, part)
    return function, defaults(of if name != "patterns.check_int" else function, **arguments)


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # "x" is a path too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of it is taken with a warning
        function, arguments = called(name)
        if name != "load_peft_adapter":  # of no adapter
            function(**arguments)
        wrong = []
        for argument in arguments:
            for what, junk in JUNK.items():
                if isinstance(arguments[argument], bool) and isinstance(junk, torch.Tensor):
                    continue  # a flag may be anything that Python takes for one; which tensors it does not is PyTorch's
                function, arguments = called(name)
                try:
                    function(**(arguments | {argument: junk}))
                except (TypeError, ValueError, KeyError, FileNotFoundError) as error:
                    # Of two arguments that do not fit each other it may be either.
                    named = re.match(r"'?(\w+)[^:]*: expected", str(error))
                    if named is None or named[1] not in {*arguments, *ALSO.get(name, ())}:
                        wrong.append(f"{argument} = {what}: {type(error).__name__}: {error}")
                except Exception as error:
                    wrong.append(f"{argument} = {what}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
