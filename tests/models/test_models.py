"""The model, its checkpoint files, its tokenizer, and the trained model that ships."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import REPOSITORY
from tidar_kernels import patterns
from tidar_kernels.models import (
    ByteTokenizer,
    Transformer,
    TransformerConfig,
    load_checkpoint,
    load_shipped,
    save_checkpoint,
    shipped,
    shipped_figures,
)
from tidar_kernels.models.training import data, publish
from tidar_kernels.models.training.config import TrainConfig
from tidar_kernels.models.training.evaluate import evaluate_decoding, evaluate_likelihood, held_out_prompts

CONFIG = TransformerConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mask_token_id=256,
    block_size=4,
)


def tiny(seed: int = 0, config: TransformerConfig = CONFIG) -> Transformer:
    """A small model whose weights are large enough for every one of them to matter to the output."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 10**9}, "hidden_size: expected <= 131072, got 1000000000"),
        ({"hidden_size": 0}, "hidden_size: expected >= 1, got 0"),
        ({"hidden_size": "32"}, "hidden_size: expected a whole number, got '32'"),
        ({"hidden_size": 32.0}, "hidden_size: expected a whole number, got 32.0"),
        ({"vocab_size": True}, "vocab_size: expected a whole number, got True"),
        ({"num_layers": -1}, "num_layers: expected >= 1, got -1"),
        ({"num_heads": 3}, "num_heads: expected a multiple of num_kv_heads = 2, got 3"),
        ({"head_dim": 7}, "head_dim: expected an even number for rotary positions, got 7"),
        ({"rope_theta": float("nan")}, "rope_theta: expected a number, got nan"),
        ({"rope_theta": 0}, "rope_theta: expected >= 1e-06, got 0"),
        ({"norm_eps": -1e-6}, "norm_eps: expected >= 0, got -1e-06"),
        ({"qk_norm": 1}, "qk_norm: expected True or False, got 1"),
        ({"mask_token_id": 258}, "mask_token_id: expected < vocab_size = 258, got 258"),
        ({"mask_token_id": -1}, "mask_token_id: expected >= 0, got -1"),
        ({"block_size": 0}, "block_size: expected >= 1, got 0"),
        ({"block_size": 1e20}, "block_size: expected a whole number"),
    ],
)
def test_shapes_are_checked(change, match):
    with pytest.raises((TypeError, ValueError), match=f"^{match}"):
        TransformerConfig(**{**CONFIG.to_dict(), **change})


def test_the_number_of_weights_is_known_from_the_shape():
    for config in (CONFIG, replace(CONFIG, qk_norm=True, num_kv_heads=4)):
        assert config.num_parameters == sum(p.numel() for p in Transformer(config).parameters())


def test_tokenizer_round_trip():
    tokenizer = ByteTokenizer()
    text = "def f(ä): return '\U0001f40d' + \"\\n\"\n\t"
    tokens = tokenizer.encode(text)
    assert tokens == list(text.encode())
    assert tokenizer.decode([*tokens[:3], 256, *tokens[3:], 257]) == text
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.encode("\ud800") == [ord("?")]
    assert (tokenizer.vocab_size, tokenizer.mask_token_id, tokenizer.eos_token_id) == (258, 256, 257)


def test_stream_decoder_equals_decode_for_every_split():
    tokenizer, rng = ByteTokenizer(), random.Random(0)
    raw = [*"naïve €5 \U0001f40d\n".encode(), 0xFF, 0xE2, 0x82]
    for _ in range(50):
        stream, out, at = tokenizer.stream(), [], 0
        while at < len(raw):
            step = rng.randint(1, 4)
            out.append(stream.push(raw[at : at + step]))
            at += step
        out.append(stream.finish())
        assert "".join(out) == tokenizer.decode(raw)


def test_stream_decoder_waits_for_a_whole_character():
    stream = ByteTokenizer().stream()
    assert stream.push([0xE2, 0x82]) == ""
    assert stream.push([0xAC]) == "€"
    assert stream.push([256, 257]) == ""
    assert stream.finish() == ""


@pytest.mark.parametrize("token", [-1, 258])
def test_tokenizer_rejects_ids_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match=rf"tokens: expected ids in \[0, 258\), got {token}"):
        ByteTokenizer().decode([65, token])
    with pytest.raises(TypeError, match="text: expected a str, got bytes"):
        ByteTokenizer().encode(b"x")


def test_checkpoint_round_trip_is_bitwise(tmp_path):
    model = tiny()
    save_checkpoint(model, tmp_path / "m.safetensors", {"note": "x"})
    torch.manual_seed(5)
    expected_random = torch.rand(3)
    torch.manual_seed(5)
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(torch.rand(3), expected_random), "loading moved the caller's random stream"
    assert loaded.config == CONFIG
    assert not loaded.training
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_checkpoint_lies_where_it_is_asked_for_whatever_the_default(tmp_path):
    model = tiny()
    save_checkpoint(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        loaded = load_checkpoint(tmp_path / "m.safetensors")
    tokens = torch.arange(5)[None]
    assert torch.equal(loaded(tokens, patterns.causal(5)), model(tokens, patterns.causal(5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_checkpoint_in_half_precision(tmp_path, dtype):
    model = tiny()
    save_checkpoint(model, tmp_path / "m.safetensors", dtype=dtype)
    kept, cast = load_checkpoint(tmp_path / "m.safetensors", dtype=None), load_checkpoint(tmp_path / "m.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor.to(dtype))
        assert torch.equal(cast.state_dict()[name], tensor.to(dtype).float())
    assert kept.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(kept.rotary.inv_freq, model.rotary.inv_freq)
    hidden = kept(torch.zeros(1, 3, dtype=torch.int64), patterns.causal(3))
    assert hidden.dtype == dtype


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_checkpoint(tiny(0), path)
    before = path.read_bytes()

    def broken(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("tidar_kernels.nn.files.os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tiny(1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_missing_checkpoint_names_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint file, got .*gone\.safetensors"):
        load_checkpoint(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="metadata: expected keys other than 'transformer_config'"):
        save_checkpoint(tiny(), tmp_path / "m.safetensors", {"transformer_config": "{}"})


@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "text"])
def test_damaged_file_is_a_value_error(tmp_path, damage):
    path = tmp_path / "m.safetensors"
    save_checkpoint(tiny(), path)
    raw = path.read_bytes()
    path.write_bytes(
        {
            "truncated": raw[: len(raw) // 2],
            "header": raw[:8] + b"\x00" * 64 + raw[72:],
            "empty": b"",
            "text": b"not a checkpoint, but long enough to look like one",
        }[damage]
    )
    with pytest.raises(ValueError, match=r"m\.safetensors: expected a complete safetensors file, got "):
        load_checkpoint(path)


def test_wrong_tensors_are_named(tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(tiny(), path)
    good, config = load_file(path), {"transformer_config": json.dumps(CONFIG.to_dict())}

    def rejected(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, match: str) -> None:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=match):
            load_checkpoint(path)

    rejected(
        {k: v for k, v in good.items() if k != "norm.weight"}, config, r"missing \['norm.weight'\], unexpected none"
    )
    rejected({**good, "extra": torch.ones(1)}, config, r"missing none, unexpected \['extra'\]")
    rejected({**good, "norm.weight": torch.ones(31)}, config, r"expected shape \[32\] for norm.weight, got \[31\]")
    rejected(good, None, r"expected 'transformer_config' in its metadata, got no metadata")
    rejected(good, {"transformer_config": "{"}, "expected a transformer configuration as JSON")
    rejected(good, {"transformer_config": "[1]"}, "expected a transformer configuration as JSON")
    few = {name: value for name, value in CONFIG.to_dict().items() if name != "head_dim"}
    rejected(good, {"transformer_config": json.dumps(few)}, r"config: expected entries \['head_dim'\], got none")
    huge = {**CONFIG.to_dict(), "hidden_size": 131072, "intermediate_size": 1048576}
    rejected(good, {"transformer_config": json.dumps(huge)}, r"expected shape \[258, 131072\] for embed_tokens")
    wrong = {**CONFIG.to_dict(), "colour": 1}
    rejected(good, {"transformer_config": json.dumps(wrong)}, r"got \['colour'\]")


@pytest.mark.parametrize(("seq_len", "block_size"), [(12, 4), (10, 4), (7, 1), (9, 16)])
def test_no_label_leaks_into_mask_rows_or_earlier_clean_rows(seq_len, block_size):
    model = tiny().double()
    pattern = patterns.tidar_training(seq_len, block_size)
    tokens = torch.randint(0, 256, (1, 2 * seq_len))
    tokens[:, seq_len:] = 256
    with torch.inference_mode():
        before = model(tokens, pattern)[0]
        for j in range(seq_len):
            changed = tokens.clone()
            changed[0, j] = (tokens[0, j] + 1) % 256
            moved = (model(changed, pattern)[0] != before).any(dim=-1)
            # A row moves exactly if it may see token j: clean rows from j on, masks of later blocks.
            may_see = [i >= j for i in range(seq_len)] + [p // block_size > j // block_size for p in range(seq_len)]
            assert moved.tolist() == may_see, j


def test_likelihood_by_hand():
    model, text = tiny(), bytes(range(40, 40 + 17))
    got = evaluate_likelihood(model, [text], seq_len=8)
    ar_bits = diffusion_bits = hits = 0.0
    row_hits = torch.zeros(4)
    pattern = patterns.tidar_training(8, 4)
    for start in (0, 8):
        clean = list(text[start : start + 8])
        logits = model.logits(model(torch.tensor([clean + [256] * 8]), pattern))[0]
        bits = -logits.log_softmax(-1) / torch.tensor(2.0).log()
        for i in range(8):
            ar_bits += bits[i, text[start + i + 1]].item() / 16
            diffusion_bits += bits[8 + i, text[start + i]].item() / 16
            hits += (logits[i].argmax() == text[start + i + 1]).item() / 16
            if i >= 4:
                row_hits[i - 4] += (logits[8 + i].argmax() == text[start + i]).item() / 2
    assert got["bytes"] == 16
    assert got["ar_bits_per_byte"] == pytest.approx(ar_bits, rel=1e-5)
    assert got["diffusion_bits_per_byte"] == pytest.approx(diffusion_bits, rel=1e-5)
    assert got["ar_accuracy"] == pytest.approx(hits)
    assert got["mask_row_accuracy"] == pytest.approx(row_hits.tolist())
    with pytest.raises(ValueError, match="texts: expected at least one longer than seq_len = 99"):
        evaluate_likelihood(model, [text], seq_len=99)


def test_decoding_figures_add_up():
    prompts = held_out_prompts({"a": bytes(range(100)), "short": b"x"}, prompt_len=20, per_module=2)
    assert {name: [p[0] for p in group] for name, group in prompts.items()} == {"a": [26, 53]}
    figures = evaluate_decoding(tiny(), prompts, max_new_tokens=12)
    assert figures["identical"]
    assert figures["tokens"] == 24
    assert sum((i + 1) * n for i, n in enumerate(figures["accepted"])) == 24
    assert figures["tokens_per_forward"] == pytest.approx(24 / sum(figures["accepted"]))


def test_shipped_model_loads_and_is_small():
    model, tokenizer = load_shipped()
    path = shipped.FOLDER / shipped.WEIGHTS
    figures = shipped_figures()
    assert path.stat().st_size == figures["file_bytes"] <= publish.MAX_BYTES
    assert model.config.to_dict() == figures["model"]
    assert model.config.vocab_size == tokenizer.vocab_size
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_shipped(torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_shipped_model_has_learnt_both_jobs():
    """On text of its kind it is far below the 8 bits a byte of a guess, and below those of a byte histogram (~4.6)."""
    model, _ = load_shipped()
    texts = data.held_out_texts()
    scores = evaluate_likelihood(model, [texts["textwrap.py"][:4097]], seq_len=512)
    assert scores["ar_bits_per_byte"] < 2.5
    assert scores["diffusion_bits_per_byte"] < 4.0
    accuracy = scores["mask_row_accuracy"]
    assert accuracy[0] > 0.5
    assert accuracy[0] > accuracy[3] > accuracy[7] > 0.15


def test_shipped_figures_are_the_documented_ones():
    docs = REPOSITORY / "docs"
    figures = shipped_figures()
    assert (docs / "model.md").read_text(encoding="utf-8") == publish.document(figures)
    assert (docs / "images" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert figures["held_out"]["decoding"]["identical"]
    assert set(figures["held_out"]["modules"]) <= set(data.HELD_OUT)
    # Every setting of the run is on record, and the record is a run that could be started again.
    assert set(figures["training"]) == set(asdict(TrainConfig.from_dict(figures["training"])))
