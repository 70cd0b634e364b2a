"""Every argument of every public callable, given what it does not take: a result, or an error that names the argument.

A callable is a line of `CALLS`, with arguments that it takes; one that is public and has no line fails a test.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import tidar_kernels as tk
from tests.toys import CONFIG
from tests.wrong_arguments import TABLES, Call, complaints, defaults, labelled, whole
from tidar_kernels import cli, eager, models, patterns, strategies
from tidar_kernels.decoding.profile import profile
from tidar_kernels.integrations import vllm
from tidar_kernels.integrations.vllm import plugin
from tidar_kernels.models import Transformer, TransformerConfig
from tidar_kernels.ops.linear import add_lora
from tidar_kernels.ops.verify import sampling_tensors

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


class Handing(Transformer):
    """A model that hands out hidden states of its layers."""

    def with_layers(self, *arguments: Any) -> Any: ...


class Beside:
    """What drafts beside it, as far as it is asked before anything is decoded."""

    config = SimpleNamespace(
        num_layers=1, num_kv_heads=2, head_dim=16, target_layers=(0,), block_size=4, mask_token_id=0
    )

    def __call__(self, *arguments: Any) -> Any: ...
    def logits(self, hidden: Any) -> Any: ...
    def remember(self, features: Any, cache: Any) -> None: ...

    def parameters(self) -> Any:
        return iter([torch.zeros(1)])


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


def served_checkpoint() -> str:
    folder = Path(tempfile.mkdtemp())
    entry = {"block_size": 4, "mask_token_id": 29}
    config = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 30, "tidar": entry}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def served(**arguments: Any) -> dict[str, Any]:
    """`engine_options` where a vLLM that was tried is installed."""
    with mock.patch.object(plugin, "installed_version", return_value="0.32.1"):
        return vllm.engine_options(**arguments)


def silent(**arguments: Any) -> int:
    """`cli.main`, which must end with an exit code whatever it is given."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return cli.main(**arguments)


CAUSAL = patterns.causal(ROWS)
SCORES = {"scale": 0.2, "softcap": 3.0, "sinks": randn(4)}
PAGED = {"block_table": None, "k_scale": None, "v_scale": None, "backend": None}
FIELDS = {name: getattr(CAUSAL, name) for name in ("lead", "own", "positions", "kv_len")}
RAGGED_ROTARY = (randn(ROWS, 1, 16), randn(ROWS, 1, 16))
RAGGED = {name: randn(ROWS, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
PATH = ints([0, 1], [0, 2])
KNOBS = {"positions": ints(4, 9), "knobs": randn(2, 5).abs(), "seeds": ints(1, 2, dtype=torch.int64)}
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
    "step_attention (into)": lambda: (
        tk.step_attention,
        operands("q", "k", "v", "k_cache", "v_cache", "lengths", pattern=CAUSAL, out=torch.empty(2, 4, ROWS, 16)),
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
    "KVCache.from_layer": lambda: (cache().from_layer, {"first": 1}),
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
    "strategies.DFlash": lambda: (strategies.DFlash, {"length": 4}),
    "strategies.DraftedModel": lambda: (strategies.DraftedModel, {"target": Handing(CONFIG), "drafter": Beside()}),
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
    "integrations.vllm.engine_options": lambda: (
        served, defaults(vllm.engine_options, folder=served_checkpoint(), max_num_seqs=2)
    ),
    "decoding.profile.profile": lambda: (
        profile, defaults(profile, model=model(), prompts=[[1, 2, 3]], max_block_size=2, new_tokens=2, repeats=1)
    ),
    "eager.attention": lambda: (eager.attention, operands("q", "k", "v", pattern=CAUSAL, **SCORES)),
    "eager.step_attention": lambda: (
        eager.step_attention,
        operands("q", "k", "v", "k_cache", "v_cache", "lengths", pattern=CAUSAL, **SCORES),
    ),
    "eager.append_kv": lambda: (eager.append_kv, operands("k_cache", "v_cache", "k", "v", "lengths")),
    "eager.compact_kv": lambda: (eager.compact_kv, operands("k_cache", "v_cache", "lengths", path=PATH)),
    "eager.rotary_append": lambda: (
        eager.rotary_append,
        operands(
            *("q", "k", "v", "k_cache", "v_cache", "lengths"), cos=randn(2, ROWS, 16), sin=randn(2, ROWS, 16), keep=2
        ),
    ),
    "eager.row_invariant_linear": lambda: (eager.row_invariant_linear, dict(LINEAR)),
    "eager.gated_lora": lambda: (eager.gated_lora, {**LINEAR, **LORA}),
    "eager.sample": lambda: (eager.sample, {"logits": randn(2, 3, 30), **KNOBS}),
    "eager.shaped_scores": lambda: (
        eager.shaped_scores, {"logits": randn(2, 3, 30), "knobs": KNOBS["knobs"], "history": None}
    ),
    "eager.verify": lambda: (
        eager.verify, {"logits": randn(2, 3, 30), "drafts": ints([1, 2, 3], [3, 4, 5], dtype=torch.int64), **KNOBS}
    ),
    "ops.linear.add_lora": lambda: (add_lora, {"base": randn(3, 6), "x": randn(3, 8), **LORA}),
    "ops.verify.sampling_tensors": lambda: (
        sampling_tensors, {"params": [tk.SamplingParams()], "device": "cpu"}
    ),
    "models.Transformer.forward": lambda: (
        model(), {"tokens": ints([1, 2, 3], dtype=torch.int64), "pattern": CAUSAL, "cache": None}
    ),
    "models.Transformer.logits": lambda: (model().logits, {"hidden": randn(2, 48)}),
    "models.ByteTokenizer.encode": lambda: (models.ByteTokenizer().encode, {"text": "x"}),
    "models.ByteTokenizer.decode": lambda: (models.ByteTokenizer().decode, {"tokens": [1]}),
    "strategies.Profile.latency": lambda: (PROFILE.latency, {"rows": 2}),
    "cli.main": lambda: (silent, {"argv": ["draw", "step", "--block-size", "2"]}),
}  # fmt: skip

ALSO = {  # names of what the argument becomes, which users know
    "strategies.DraftedModel": ("model",),
    "strategies.by_name": ("strategy", "stride"),
    "strategies.class_of": ("strategy",),
    "strategies.tree": ("paths",),
}
# Not tried here, with the reason.
ELSEWHERE = {
    # Results and enumerations, whose fields nobody passes.
    *("GenerationResult", "TiDARLoss", "patterns.PatternTable", "patterns.Role", "strategies.Plan"),
    *("strategies.Batch", "strategies.DecoderModel", "strategies.Drafting", "strategies.StepResult"),
    *("ops.verify.Knob", "ops.verify.SamplingTensors", "ops.verify.Verified"),
    # The arguments of `torch.nn.Module.to`.
    *("Pattern.to", "patterns.PatternBatch.to"),
    # What a session calls of a strategy, and a strategy of what it is given.
    "strategies.Strategy",
    *("strategies.DecoderModel.logits", *(f"strategies.Drafter{name}" for name in ("", ".logits", ".remember"))),
    *("strategies.DraftedModel.draft", "strategies.DraftedModel.logits"),
    *(f"strategies.Batch.{name}" for name in ("draft", "forward", "logits", "narrowed", "sequence")),
    *(
        f"strategies.{name}.{method}"
        for name in ("Adaptive", "BlockDiffusion", "DFlash", "Drafting", "SelfSpeculation", "Strategy", "Tree")
        for method in ("context", "first", "kept", "step")
    ),
    # What `Decoder` has of it has lines above.
    "decoding.ModelDecoder",
    # No arguments.
    *("cli.build_parser", "models.ByteTokenizer", "models.shipped_figures", "ops.interpreting"),
    "strategies.autoregressive",
    *("integrations.vllm.check_version", "integrations.vllm.register"),
    # What the bridges share.
    "integrations.causal.causal",
    # Made by `patch` alone.
    *("integrations.patch.PatchedAttention", "integrations.patch.PatchedAttention.forward"),
    # Of a mesh of processes: tests/distributed/test_wrong_arguments.py.
    "models.tensor_parallel",
}  # fmt: skip


def test_every_public_callable_has_a_line() -> None:
    missing = []
    for module, names in labelled().items():
        room = max((room for room in TABLES if f"{module}.".startswith(f"{room}.")), key=len)
        table = importlib.import_module(TABLES[room])
        known = {name.partition(" (")[0] for name in table.CALLS} | table.ELSEWHERE
        missing += [name for name in names if name not in known]
    assert missing == []


@pytest.mark.filterwarnings("ignore")  # names that go in the next release
@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # "x" is a path too
    if name != "load_peft_adapter":  # of no adapter
        function, arguments = whole(name, CALLS)
        function(**arguments)
    assert complaints(functools.partial(whole, name, CALLS), ALSO.get(name, ())) == []
