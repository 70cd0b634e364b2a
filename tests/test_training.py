"""Training: what text it sees, what it minimises, and that an interrupted run is the same run."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tidar_kernels.models import load_checkpoint, publish
from tidar_kernels.models.data import HELD_OUT, Corpus, held_out_texts, stdlib_folder, training_files
from tidar_kernels.models.tokenizer import EOS_ID, MASK_ID
from tidar_kernels.models.train import TrainConfig, Trainer, main, tidar_loss
from tidar_kernels.models.transformer import Transformer
from tidar_kernels.patterns import causal, tidar_prefill, tidar_training

TINY = TrainConfig(
    steps=6,
    batch=2,
    seq_len=16,
    block_size=4,
    warmup=2,
    decay=0.5,
    workers=2,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


@pytest.fixture
def folder(tmp_path):
    """A small library: two modules, one of them in a package, and things that must not be read."""
    library = tmp_path / "lib"
    for name, text in {
        "alpha.py": "import sys\n" * 20,
        "pack/beta.py": "def beta(x):\n    return x + 1\n" * 10,
        "heapq.py": "HELD OUT",
        "pack/heapq.py": "not held out: another module\n",
        "test/test_alpha.py": "A TEST",
        "pack/tests/test_beta.py": "A TEST",
        "site-packages/other/code.py": "FOREIGN",
        "encodings/cp037.py": "TABLE",
        "_sysconfigdata__linux.py": "BUILD",
        "config-3/python-config.py": "BUILD",
        "notes.txt": "NOT PYTHON",
    }.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(text)
    return library


def test_which_files_are_trained_on(folder, tmp_path):
    assert [f.as_posix() for f in training_files(folder)] == ["alpha.py", "pack/beta.py", "pack/heapq.py"]
    assert held_out_texts(folder) == {"heapq.py": b"HELD OUT"}
    with pytest.raises(FileNotFoundError, match=r"folder: expected \.py files"):
        training_files(tmp_path / "empty")


def test_held_out_modules_exist_and_are_in_no_training_text():
    files = training_files()
    assert len(files) > 300
    assert not {f.as_posix() for f in files} & set(HELD_OUT)
    texts = held_out_texts()
    assert tuple(texts) == HELD_OUT
    everything = b"\0".join((stdlib_folder() / f).read_bytes() for f in files)
    for name, text in texts.items():
        # A stretch from the middle of the code: a copy under another name would be a leak too.
        middle = text[len(text) // 2 : len(text) // 2 + 200]
        assert middle not in everything, name


def test_corpus_joins_files_with_end_of_text(folder):
    corpus = Corpus(folder)
    texts = [(folder / f).read_bytes() for f in training_files(folder)]
    assert corpus.tokens.tolist() == [token for text in texts for token in [*text, EOS_ID]]
    assert corpus.num_files == 3
    assert corpus.sha256 == Corpus(folder).sha256
    (folder / "alpha.py").write_text("changed")
    assert corpus.sha256 != Corpus(folder).sha256


def test_windows_are_a_function_of_their_number_and_cover_evenly(folder):
    corpus = Corpus(folder)
    many = corpus.windows(0, 64, 9, seed=3)
    assert many.dtype == torch.int64
    assert torch.equal(corpus.windows(10, 5, 9, seed=3), many[10:15])
    assert not torch.equal(corpus.windows(0, 64, 9, seed=4), many)
    text = corpus.tokens.tolist()
    assert all(any(text[i : i + 9] == w for i in range(len(text) - 8)) for w in many.tolist())
    with pytest.raises(ValueError, match=f"length: expected <= {len(text)} tokens of corpus, got {len(text) + 1}"):
        corpus.windows(0, 1, len(text) + 1, seed=0)


def test_window_starts_are_even(folder):
    corpus = Corpus(folder)
    corpus.tokens = torch.arange(1000).numpy()  # a window's first token is now where it starts
    starts = corpus.windows(0, 500, 1, seed=0)[:, 0]
    counts = torch.histc(starts.float(), bins=20, min=0, max=1000)
    assert counts.min() >= 23
    assert counts.max() <= 27
    assert len(set((starts % 8).tolist())) == 8


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.25])
def test_loss_is_the_papers_formula(alpha):
    """Every term apart: a causal term from its own prefix, a mask term from its own block behind the clean tokens."""
    torch.manual_seed(0)
    seq_len, block_size, batch = 10, 4, 2
    model = Transformer(TINY.model()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randint(0, 256, (batch, seq_len + 1))
    ar_terms, diff_terms = [], []
    for row in tokens.tolist():
        for i in range(seq_len):
            prefix = torch.tensor([row[: i + 1]])
            logits = model.logits(model(prefix, causal(i + 1)))[0, i]
            ar_terms.append(torch.logsumexp(logits, 0) - logits[row[i + 1]])
        for start in range(0, seq_len, block_size):
            width = min(block_size, seq_len - start)
            # The mask rows behind a prompt of the earlier clean tokens; with none, the first block of training.
            pattern = tidar_prefill(start, width) if start else tidar_training(width, width)
            known = torch.tensor([row[: start or width] + [MASK_ID] * width])
            logits = model.logits(model(known, pattern))[0, -width:]
            diff_terms += [torch.logsumexp(logits[m], 0) - logits[m, row[start + m]] for m in range(width)]
    ar, diff = torch.stack(ar_terms).mean(), torch.stack(diff_terms).mean()
    loss, got_ar, got_diff = tidar_loss(model, tokens, block_size, MASK_ID, alpha)
    # tidar_loss takes its cross-entropies in float32: tolerance of a mean of float32 terms.
    torch.testing.assert_close(got_ar.double(), ar, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_diff.double(), diff, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), (alpha * ar + diff) / (1 + alpha), rtol=1e-6, atol=0)


def test_schedule():
    config = TrainConfig(steps=100, batch=4, seq_len=64, warmup=10, decay=0.3, lr=1.0, final_lr=0.1)
    assert [config.window(s) for s in (0, 69, 70, 99)] == [(8, 32), (8, 32), (4, 64), (4, 64)]
    assert config.lr_at(0) == pytest.approx(0.1)
    assert all(config.lr_at(s) == 1.0 for s in range(9, 71))
    assert config.lr_at(85) == pytest.approx(0.1 + 0.9 / 2)
    assert config.lr_at(99) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 29 / 30)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps: expected >= 1, got 0"),
        ({"seq_len": 33}, "seq_len: expected an even number"),
        ({"batch": 3, "workers": 2}, "batch: expected a multiple of workers = 2, got 3"),
        ({"decay": 0.0}, "decay: expected a share"),
        ({"precision": "int8"}, "precision: expected"),
    ],
)
def test_bad_configurations(options, match):
    with pytest.raises(ValueError, match=match):
        TrainConfig(**options)


def states_equal(a: Trainer, b: Trainer) -> bool:
    return a.curve == b.curve and all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_same_run_bit_for_bit(folder, tmp_path, precision):
    config, corpus = TrainConfig(**{**vars(TINY), "precision": precision}), Corpus(folder)
    whole = Trainer(config, corpus)
    whole.run(tmp_path / "whole")
    parts = Trainer(config, corpus)
    initial = [p.clone() for p in parts.parameters]
    parts.run(tmp_path / "parts", save_every=1, steps=2)
    assert parts.done == 2
    resumed = Trainer.resume(tmp_path / "parts", corpus)
    assert resumed.seconds == parts.seconds > 0
    resumed.run(tmp_path / "parts")
    assert resumed.done == whole.done == 6
    assert states_equal(resumed, whole)
    assert all(not torch.equal(p, q) for p, q in zip(initial, whole.parameters, strict=True)), "a weight never moved"
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["model.safetensors", "state.pt"]
    assert load_checkpoint(tmp_path / "parts" / "model.safetensors").config == config.model()
    other_seed = Trainer(TrainConfig(**{**vars(config), "seed": 1}), corpus)
    other_seed.run(tmp_path / "other")
    assert not states_equal(other_seed, whole)


def test_shares_of_a_step_add_up_to_the_whole_step(folder):
    """Two workers' mean gradient is that of one worker, to float32 rounding of sums in another order."""
    corpus = Corpus(folder)
    one, two = (
        Trainer(TrainConfig(**{**vars(TINY), "precision": "fp32", "workers": n, "grad_clip": 1e9}), corpus)
        for n in (1, 2)
    )
    assert one.step() == pytest.approx(two.step(), rel=1e-5)
    for a, b in zip(one.parameters, two.parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_steps_take_windows_in_turn(folder):
    corpus = Corpus(folder)
    trainer = Trainer(TINY, corpus)
    assert torch.equal(torch.cat([trainer.batch(s) for s in range(3)]), corpus.windows(0, 12, 9, TINY.seed))
    assert torch.equal(trainer.batch(3), corpus.windows(12, 2, 17, TINY.seed))


def test_interrupt_saves(folder, tmp_path, monkeypatch):
    corpus = Corpus(folder)
    trainer = Trainer(TINY, corpus)
    step = trainer.step

    def interrupted() -> tuple[float, float]:
        if trainer.done == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(tmp_path / "run")
    assert Trainer.resume(tmp_path / "run", corpus).done == 2


def test_resume_with_another_end(folder, tmp_path):
    corpus = Corpus(folder)
    trainer = Trainer(TINY, corpus)
    trainer.run(tmp_path / "run", steps=3)
    longer = Trainer.resume(tmp_path / "run", corpus, steps=8)
    longer.run(tmp_path / "longer")
    from_the_start = Trainer(TrainConfig(**{**vars(TINY), "steps": 8}), corpus)
    from_the_start.run(tmp_path / "from the start")
    assert longer.done == from_the_start.done == 8
    assert states_equal(longer, from_the_start)
    with pytest.raises(ValueError, match="steps: expected 6, towards which the run decays, got 4"):
        Trainer.resume(tmp_path / "run", corpus, steps=4)
    trainer.run(tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match="steps: expected 6"):
        Trainer.resume(tmp_path / "run", corpus, steps=8)
    (folder / "alpha.py").write_text("other text\n" * 30)
    with pytest.raises(ValueError, match="resume: expected a corpus with sha256"):
        Trainer.resume(tmp_path / "run", Corpus(folder))


def test_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tidar_kernels.models.data.stdlib_folder", lambda: folder)
    options = [f"--{k.replace('_', '-')}={v}" for k, v in vars(TINY).items()]
    assert main(["--out", str(tmp_path / "run"), *options]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"] == 6
    assert "step 6/6" in printed.err
    assert main(["--out", str(tmp_path / "run"), "--resume"]) == 0
    assert main(["--out", str(tmp_path / "nowhere"), "--resume"]) == 2
    assert main(["--out", str(tmp_path / "new"), "--batch=3"]) == 2
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "run"), "--resume", "--lr=1"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--seq-len" in capsys.readouterr().out


def test_publish_writes_weights_figures_and_page(folder, tmp_path, monkeypatch):
    (folder / "heapq.py").write_text("def heappush(heap, item):\n    heap.append(item)\n" * 30)
    monkeypatch.setattr("tidar_kernels.models.data.stdlib_folder", lambda: folder)
    trainer = Trainer(TINY, Corpus(folder))
    trainer.run(tmp_path / "run", steps=5)
    with pytest.raises(ValueError, match="run: expected all 6 steps done, got 5"):
        publish.publish(tmp_path / "run", tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
    trainer.run(tmp_path / "run")
    figures = publish.publish(tmp_path / "run", tmp_path / "shipped", notes=["stopped once"])
    written = json.loads((tmp_path / "shipped" / "training.json").read_text())
    weights = load_checkpoint(tmp_path / "shipped" / "model.safetensors", dtype=None)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(weights.state_dict()[name], tensor.half())
    assert written["tokens_seen"] == 6 * 2 * 16
    assert [point[0] for point in written["curve"]] == [1, 2, 3, 4, 5, 6]
    assert figures["held_out"]["modules"] == ["heapq.py"]
    written["held_out"] = "stale"
    (tmp_path / "shipped" / "training.json").write_text(json.dumps(written))
    publish.measure_again(tmp_path / "shipped")
    written = json.loads((tmp_path / "shipped" / "training.json").read_text())
    assert written["held_out"]["decoding"]["tokens"] == figures["held_out"]["decoding"]["tokens"]
    assert written["notes"] == ["stopped once"]
    page = publish.document(written)
    assert f"{figures['parameters']:,} parameters" in page
    assert "--seq-len 16" in page
    assert "\nOf this run:\n\n- stopped once\n\n## Held-out" in page
    assert "Of this run" not in publish.document({**written, "notes": []})
    publish.draw_curve(written, tmp_path / "docs" / "images" / "curve.png")
    assert (tmp_path / "docs" / "images" / "curve.png").read_bytes().startswith(b"\x89PNG")
