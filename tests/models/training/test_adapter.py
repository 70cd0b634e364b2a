"""Training a gated adapter: its rows, a loss that falls, and a base that stays."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tidar_kernels import Decoder
from tidar_kernels.cli import main
from tidar_kernels.models import Transformer, TransformerConfig, load_shipped, load_shipped_adapter
from tidar_kernels.models.shipped import ADAPTER
from tidar_kernels.models.tokenizer import EOS_ID
from tidar_kernels.models.training import adapter
from tidar_kernels.models.training.data import Corpus, folder_files
from tidar_kernels.nn.adapters import add_gated_lora, load_peft_adapter, save_adapter
from tidar_kernels.nn.distillation import adapter_pattern
from tidar_kernels.patterns import Role

CONFIG = TransformerConfig(260, 32, 48, 2, 2, 1, 16, mask_token_id=258, block_size=4)


@pytest.mark.parametrize(("seq_len", "block"), [(12, 4), (7, 3)])
def test_rows_of_isd(seq_len: int, block: int) -> None:
    """Masks are a chain after the tokens before their block, and predict the token at their own position."""
    pattern = adapter_pattern("isd", seq_len, block)
    dense = pattern.dense()
    for q in range(2 * seq_len):
        position, is_mask = int(pattern.positions[q]), int(pattern.roles[q]) == Role.MASK
        for k in range(2 * seq_len):
            at, key_is_mask = int(pattern.positions[k]), int(pattern.roles[k]) == Role.MASK
            start = position // block * block
            if is_mask:
                visible = start <= at <= position if key_is_mask else at < start
            else:
                visible = not key_is_mask and at <= position
            assert bool(dense[q, k]) == visible
        assert int(pattern.predicts[q]) == (position if is_mask else -1)


@pytest.mark.parametrize("kind", ["isd", "tidar"])
def test_documents_of_a_window_do_not_see_each_other(kind: str) -> None:
    """No row moves with a token of another document, and the loss is that of the documents one by one."""
    tokens = torch.tensor([[9, 7, EOS_ID, 5, 6, 8, 4], [1, EOS_ID, EOS_ID, 2, 3, 9, EOS_ID]])
    lengths = [3, 4, 2, 1, 4]
    torch.manual_seed(0)
    model, kept = Transformer(CONFIG).double(), {}
    add_gated_lora(model, 4, 8.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_()
    model.embed_tokens.register_forward_hook(lambda module, args, out: kept.update(embedded=out.requires_grad_()))
    model.norm.register_forward_hook(lambda module, args, out: kept.update(hidden=out))
    together = adapter.training_loss(model, tokens, kind, 2)
    embedded, hidden = kept["embedded"], kept["hidden"]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).repeat(2)
    for index in range(len(lengths)):
        rows = document == index
        probe = torch.randn_like(hidden[0, rows])
        (grad,) = torch.autograd.grad((hidden[0, rows] * probe).sum(), embedded, retain_graph=True)
        assert not grad[0, ~rows].any()
        assert grad[0, rows].any()
    apart = [adapter.training_loss(model, part[None], kind, 2) for part in tokens.flatten().split(lengths)]
    asked = torch.tensor([n - 1 for n in lengths], dtype=torch.float64)
    torch.testing.assert_close(together, (torch.stack(apart) * asked).sum() / asked.sum())


def test_the_loss_falls_and_the_base_stays(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for index in range(4):
        (tmp_path / "text" / f"{index}.py").write_text("x = 1\ny = 2\n" * 60)
    corpus = Corpus(folder_files(tmp_path / "text"))
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.embed_tokens.weight.mul_(20.0)  # so that what an adapter moves shows in the logits
    base = copy.deepcopy(model)
    add_gated_lora(model, 4, 8.0)
    config = adapter.AdapterConfig(steps=40, batch_size=4, seq_len=32, block_size=4, rank=4, lr=2e-2)
    losses = adapter.train(model, config, corpus)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    for name, parameter in base.named_parameters():
        wrapped = name.replace("_proj.weight", "_proj.base.weight")
        assert torch.equal(model.get_parameter(wrapped), parameter)
    prompt = list(b"x = 1\ny")
    expected = Decoder(base, mode="autoregressive").generate([prompt], 20).tokens
    save_adapter(model, tmp_path / "adapter")
    load_peft_adapter(base, tmp_path / "adapter")
    decoded = [Decoder(m, strategy="isd", stride=4).generate([prompt], 20) for m in (model, base)]
    assert decoded[0].tokens == decoded[1].tokens == expected
    assert decoded[0].accepted == decoded[1].accepted


def test_the_shipped_adapter_drafts_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte the base model's output, greedy and sampled, and at most 1 MB."""
    files = list(ADAPTER.iterdir())
    assert sum(file.stat().st_size for file in files) <= adapter.MAX_BYTES
    base, tokenizer = load_shipped()
    adapted = load_shipped_adapter(load_shipped()[0])
    prompts = [tokenizer.encode("def main(argv=None):\n    "), tokenizer.encode("import os\n")]
    expected = [Decoder(base, mode="autoregressive").generate(prompts, 100, temperature=t).tokens for t in (0.0, 0.8)]
    drafted = [Decoder(m, strategy="isd", stride=8) for m in (base, adapted)]
    for temperature, tokens in zip((0.0, 0.8), expected, strict=True):
        results = [decoder.generate(prompts, 100, temperature=temperature) for decoder in drafted]
        assert [result.tokens for result in results] == [tokens, tokens]
        assert results[0].accepted != results[1].accepted
    decode = ["generate", "--prompt", "import os\n", "--max-new-tokens", "20", "--compare", "--adapter"]
    assert main([*decode, "shipped"]) == 0
    assert "outputs identical: yes" in capsys.readouterr().out
    assert main([*decode, "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r'^pattern: expected "isd" or "tidar", got "?\'?flare'):
        adapter_pattern("flare", 8, 4)
    with pytest.raises(SystemExit):
        adapter.main([])
    assert "expected one of --out and --ship" in capsys.readouterr().err
