"""Training: what it minimises, and that an interrupted run is the same run."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
import torch

from tests.models.training.runs import TINY, changed, states_equal
from tidar_kernels.models import load_checkpoint
from tidar_kernels.models.tokenizer import EOS_ID, MASK_ID
from tidar_kernels.models.training import publish
from tidar_kernels.models.training.data import Corpus, document_lengths, folder_files
from tidar_kernels.models.training.evaluate import evaluate_briefly, evaluate_decoding, evaluate_likelihood
from tidar_kernels.models.training.report import draw_curve, evaluate_run
from tidar_kernels.models.training.trainer import (
    TrainConfig,
    Trainer,
    model_config,
    read_state,
    training_loss,
    weights_sha256,
)
from tidar_kernels.models.transformer import Transformer, TransformerConfig
from tidar_kernels.patterns import causal, tidar_prefill, tidar_training


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.25])
def test_loss_is_the_papers_formula(alpha):
    """Every term apart: a causal term from its own prefix, a mask term from its own block after the clean tokens."""
    torch.manual_seed(0)
    seq_len, block_size, batch = 10, 4, 2
    model = Transformer(model_config(TINY)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randint(0, 256, (batch, seq_len))
    ar_terms, diff_terms = [], []
    for row in tokens.tolist():
        for i in range(seq_len - 1):  # the last clean row has no next token
            prefix = torch.tensor([row[: i + 1]])
            logits = model.logits(model(prefix, causal(i + 1)))[0, i]
            ar_terms.append(torch.logsumexp(logits, 0) - logits[row[i + 1]])
        for start in range(0, seq_len, block_size):
            width = min(block_size, seq_len - start)
            # The mask rows after a prompt of the earlier clean tokens; with none, the first block of training.
            pattern = tidar_prefill(start, width) if start else tidar_training(width, width)
            known = torch.tensor([row[: start or width] + [MASK_ID] * width])
            logits = model.logits(model(known, pattern))[0, -width:]
            diff_terms += [torch.logsumexp(logits[m], 0) - logits[m, row[start + m]] for m in range(width)]
    ar, diff = torch.stack(ar_terms).mean(), torch.stack(diff_terms).mean()
    loss, got_ar, got_diff = training_loss(model, tokens, block_size, alpha)
    # tidar_loss takes its cross-entropies in float32: tolerance of a mean of float32 terms.
    torch.testing.assert_close(got_ar.double(), ar, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_diff.double(), diff, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.double(), (alpha * ar + diff) / (1 + alpha), rtol=1e-6, atol=0)


def random_windows(generator: torch.Generator, batch: int, seq_len: int, share: float) -> torch.Tensor:
    """Windows of text in which each token ends a document with probability `share`."""
    tokens = torch.randint(0, 256, (batch, seq_len), generator=generator)
    return torch.where(torch.rand(batch, seq_len, generator=generator) < share, EOS_ID, tokens)


@pytest.mark.parametrize("seed", range(8))
def test_no_document_has_a_gradient_into_another(seed):
    """Not a row of one document moves with an embedding of another one in its window, or in another window."""
    generator = torch.Generator().manual_seed(seed)
    tokens = random_windows(generator, 2, 18, 0.15 + 0.05 * seed)
    lengths = document_lengths(tokens)
    assert sum(lengths) == 36
    assert len(lengths) > 2
    model, kept = Transformer(model_config(TINY)).double(), {}

    def keep(name):
        return lambda module, args, out: kept.update({name: out})

    model.embed_tokens.register_forward_hook(keep("embedded"))
    model.norm.register_forward_hook(keep("hidden"))
    training_loss(model, tokens, 3)
    embedded, hidden = kept["embedded"], kept["hidden"]
    assert hidden.shape[:2] == (1, 72)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).repeat(2)
    for index in range(len(lengths)):
        rows = document == index
        probe = torch.randn(hidden[0, rows].shape, generator=generator, dtype=torch.float64)
        (grad,) = torch.autograd.grad((hidden[0, rows] * probe).sum(), embedded, retain_graph=True)
        assert not grad[0, ~rows].any(), index
        assert grad[0, rows].any(), index


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_documents_in_windows_are_the_documents_one_by_one(share):
    tokens = random_windows(torch.Generator().manual_seed(1), 3, 20, share)
    model = Transformer(model_config(TINY)).double()
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for document in tokens.flatten().split(document_lengths(tokens)):
        _, ar, diffusion = training_loss(model, document[None], 4)
        own = torch.tensor([len(document) - 1, len(document)])
        sums += torch.stack([ar, diffusion]).double() * own
        counts += own
    loss, ar, diffusion = training_loss(model, tokens, 4, alpha=0.3)
    means = sums / counts
    torch.testing.assert_close(torch.stack([ar, diffusion]).double(), means, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), (0.3 * means[0] + means[1]) / 1.3, rtol=1e-5, atol=0)


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
        ({"batch": 4, "workers": 2, "accumulate": 3}, "batch: expected a multiple of workers x accumulate = 6, got 4"),
        ({"block_sizes": ()}, "block_sizes: expected a list of one or more whole numbers"),
        ({"block_sizes": (8, 0)}, r"block_sizes: expected each >= 1, got \(8, 0\)"),
        ({"block_sizes": (8, 512)}, "block_sizes: expected each <= seq_len / 2 = 256"),
        ({"num_heads": 3}, "num_heads: expected a multiple of num_kv_heads = 2, got 3"),
        ({"head_dim": 5}, "head_dim: expected an even number"),
        ({"grad_clip": 0}, "grad_clip: expected > 0"),
        ({"lr": -1.0}, "lr: expected >= 0, got -1"),
        ({"decay": 0.0}, "decay: expected a share"),
        ({"precision": "int8"}, "precision: expected one of bf16, fp32, got 'int8'"),
        ({"optimizer": "sgd"}, "optimizer: expected one of muon, adamw"),
        ({"steps": 1.5}, "steps: expected a whole number, got 1.5"),
        ({"steps": True}, "steps: expected a whole number, got True"),
        ({"seed": 10**400}, "seed: expected a whole number"),
        ({"seed": 10**23}, "seed: expected <= 18446744073709551615, got 100000000000000000000000"),
        ({"seed": -1}, "seed: expected >= 0, got -1"),
        ({"hidden_size": 10**9}, "hidden_size: expected <= 131072, got 1000000000"),
        ({"intermediate_size": 10**9}, "intermediate_size: expected <= 1048576, got 1000000000"),
        ({"num_layers": 10**20}, "num_layers: expected <= 4096, got 100000000000000000000"),
        ({"num_heads": 10**9}, "num_heads: expected <= 4096"),
        ({"head_dim": 10**6}, "head_dim: expected <= 4096"),
        ({"workers": 10**5}, "workers: expected <= 1024, got 100000"),
        ({"steps": 10**20}, "steps: expected <= 2147483647"),
        ({"batch": 10**18}, "batch: expected <= 1048576"),
        ({"accumulate": 10**18}, "accumulate: expected <= 1048576"),
        ({"seq_len": 10**18}, "seq_len: expected <= 1048576"),
        ({"warmup": 10**18}, "warmup: expected <= 2147483647"),
        ({"block_sizes": (10**20,)}, r"block_sizes: expected each <= 65536, got \(100000000000000000000,\)"),
        ({"lr": 1e300}, "lr: expected <= 1000.0, got 1e\\+300"),
        ({"alpha": 1e300}, "alpha: expected <= 1000000.0"),
        ({"final_lr": 2}, "final_lr: expected <= 1, got 2.0"),
        ({"weight_decay": 1e9}, "weight_decay: expected <= 1000000.0"),
        ({"lr": "high"}, "lr: expected a number, got 'high'"),
        ({"lr": math.nan}, "lr: expected a number, got nan"),
        ({"alpha": 10**400}, "alpha: expected a number"),
        ({"block_sizes": 8}, "block_sizes: expected a list of one or more whole numbers, got 8"),
        ({"step": 3}, "step: expected one of the settings steps, batch, .*, got 'step'"),
    ],
)
def test_bad_configurations(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        TrainConfig.from_dict(options)


def test_every_number_has_a_range():
    for entry in fields(TrainConfig):
        if entry.metadata["kind"] is not str and entry.name != "grad_clip":  # a clip may be as large as one likes
            assert entry.metadata["high"] < math.inf, entry.name
    for entry in fields(TransformerConfig):
        bounded = entry.metadata["kind"] is bool or entry.name == "mask_token_id" or entry.metadata["high"] < math.inf
        assert bounded, entry.name


def test_a_model_that_does_not_fit_is_refused_before_it_is_allocated(corpus):
    large = changed(hidden_size=2**17, intermediate_size=2**20, num_layers=2**12)
    with pytest.raises(ValueError, match=r"^config: expected a model that fits into the .* GiB of cpu, got [\d,]+ p"):
        Trainer(large, corpus)


def test_block_lengths_take_turns():
    config = TrainConfig(block_sizes=[4, 8, 16], workers=2, batch=4)
    assert [config.block_size(step, share) for step in range(3) for share in range(2)] == [4, 8, 16, 4, 8, 16]
    assert model_config(config).block_size == 4
    assert config == TrainConfig(block_sizes=(4, 8, 16), workers=2, batch=4)
    assert TrainConfig(lr=1).lr == 1.0


VARIANTS = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "accumulate": {"batch": 4, "accumulate": 2},
    "adamw": {"optimizer": "adamw"},
    "two block lengths": {"block_sizes": (4, 2), "batch": 3, "workers": 3},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_is_the_same_run_bit_for_bit(corpus, tmp_path, changes):
    config = changed(**changes)
    whole = Trainer(config, corpus)
    initial = [p.clone() for p in whole.parameters]
    whole.run(tmp_path / "whole")
    parts = Trainer(config, corpus)
    parts.run(tmp_path / "parts", save_every=1, steps=2)
    assert parts.done == parts.saved == 2
    torch.manual_seed(99)  # what else a process does with its random numbers is no part of the run
    resumed = Trainer.resume(tmp_path / "parts", corpus)
    assert resumed.seconds == parts.seconds > 0
    resumed.run(tmp_path / "parts")
    assert resumed.done == whole.done == 6
    assert states_equal(resumed, whole)
    assert all(not torch.equal(p, q) for p, q in zip(initial, whole.parameters, strict=True)), "a weight never moved"
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["model.safetensors", "state.pt"]
    assert load_checkpoint(tmp_path / "parts" / "model.safetensors").config == model_config(config)


def test_what_a_run_depends_on(corpus, tmp_path):
    runs = {}
    for changes in ({}, {"seed": 1}, {"optimizer": "adamw"}, {"block_sizes": (4, 2)}, {"alpha": 0.5}):
        trainer = runs[str(changes)] = Trainer(changed(**changes), corpus)
        trainer.step()
    first, *others = runs.values()
    assert not any(states_equal(first, other) for other in others)


def test_an_evaluation_changes_no_bit_of_the_run(folder, corpus, tmp_path):
    (folder / "heapq.py").write_bytes(bytes(range(256)) * 2)
    plain, watched = (Trainer(TINY, corpus) for _ in range(2))
    for _ in range(TINY.steps):
        plain.step()
        watched.step()
        before = torch.get_rng_state(), watched.model.training
        evaluate_run(watched, corpus.files.held_out_texts())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert watched.model.training == before[1]
    assert states_equal(plain, watched)
    assert [one["step"] for one in watched.evaluations] == [1, 2, 3, 4, 5, 6]
    again = evaluate_run(watched, corpus.files.held_out_texts())
    assert [one["step"] for one in watched.evaluations] == [1, 2, 3, 4, 5, 6]
    watched.save(tmp_path)
    assert Trainer.resume(tmp_path, corpus).evaluations[-1]["blocks"] == again["blocks"]


def test_a_brief_evaluation_is_a_sample_of_the_long_one():
    torch.manual_seed(0)
    model = Transformer(model_config(TINY)).eval()
    texts = {"a": bytes(torch.randint(0, 256, (200,)).tolist()), "b": b"short"}
    brief = evaluate_briefly(model, texts, [4, 2], 16, max_windows=99, max_new_tokens=8)
    assert brief["skipped"] == []
    for block in brief["blocks"]:
        assert evaluate_likelihood(model, texts.values(), 16, block["block_size"]).items() <= block.items()
        assert len(block["mask_row_accuracy"]) == block["block_size"]
    decoded = evaluate_decoding(model, {"a": [texts["a"][92:108]]}, max_new_tokens=8)
    assert brief["blocks"][0]["tokens_per_forward"] == decoded["tokens_per_forward"]
    assert evaluate_briefly(model, texts, [4], 16, max_windows=3)["blocks"][0]["bytes"] == 3 * 16
    short = evaluate_briefly(model, {"b": b"short"}, [4], 16)
    assert short["blocks"] == [{"block_size": 4}]
    assert [reason.partition(":")[0] for reason in short["skipped"]] == ["bits a byte", "tokens a forward"]


@pytest.mark.parametrize("short", [False, True], ids=["long documents", "short documents"])
def test_shares_of_a_step_add_up_to_the_whole_step(corpus, tmp_path, short):
    """The mean gradient of four shares is that of one, to float32 rounding of sums in another order."""
    if short:
        (tmp_path / "short").mkdir()
        for i in range(30):
            (tmp_path / "short" / f"{i}.py").write_text(f"{i}\n" * (1 + i % 5))
        corpus = Corpus(folder_files(tmp_path / "short"))
    one, *others = (
        Trainer(changed(precision="fp32", grad_clip=1e9, batch=4, workers=workers, accumulate=accumulate), corpus)
        for workers, accumulate in ((1, 1), (2, 1), (2, 2), (1, 4))
    )
    losses = one.step()
    for other in others:
        assert other.step() == pytest.approx(losses, rel=1e-5)
        for a, b in zip(one.parameters, other.parameters, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_steps_take_windows_in_turn(corpus):
    trainer = Trainer(TINY, corpus)
    assert torch.equal(torch.cat([trainer.batch(s) for s in range(3)]), corpus.windows(0, 12, 8, TINY.seed))
    assert torch.equal(trainer.batch(3), corpus.windows(12, 2, 16, TINY.seed))


def test_a_run_can_start_from_other_weights(corpus, tmp_path):
    first = Trainer(TINY, corpus)
    first.step()
    init = Transformer(model_config(changed(block_sizes=(8,))))
    init.load_state_dict(first.model.state_dict())
    second = Trainer(changed(seed=1), corpus, init=init)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters, second.parameters, strict=True))
    digest = weights_sha256(first.model)
    assert second.init_sha256 == digest
    second.step()
    assert digest == weights_sha256(init), "training must not write into the weights that it was given"
    second.save(tmp_path)
    assert Trainer.resume(tmp_path, corpus).init_sha256 == digest != weights_sha256(second.model)
    with pytest.raises(ValueError, match="init: expected a model with num_layers = 2, got 1"):
        Trainer(TINY, corpus, init=Transformer(model_config(changed(num_layers=1))))


def test_a_corpus_must_fill_a_window(corpus):
    length = len(corpus.tokens)
    with pytest.raises(ValueError, match=f"corpus: expected at least seq_len = {length + length % 2 + 2} tokens"):
        Trainer(changed(seq_len=length + length % 2 + 2), corpus)


# The schedule's end, and publishing.


def test_resume_with_another_end(folder, corpus, tmp_path):
    trainer = Trainer(TINY, corpus)
    trainer.run(tmp_path / "run", steps=3)
    longer = Trainer.resume(tmp_path / "run", corpus, steps=8)
    longer.run(tmp_path / "longer")
    from_the_start = Trainer(changed(steps=8), corpus)
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
        Trainer.resume(tmp_path / "run", Corpus(corpus.files))


@pytest.mark.thorough
def test_publish_writes_weights_figures_and_page(folder, tmp_path, monkeypatch):
    (folder / "heapq.py").write_text("def heappush(heap, item):\n    heap.append(item)\n" * 30)
    monkeypatch.setattr("tidar_kernels.models.training.data.stdlib_folder", lambda: folder)
    trainer = Trainer(changed(block_sizes=(4, 8)), Corpus())
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
    assert "trained from scratch" in page
    assert "| first weights | random |" in page
    assert "| block lengths | 4 and 8, in turn |" in page
    assert "tidar-kernels train --out runs/stdlib --steps 6 --batch 2 --seq-len 16 --block-sizes 4,8 --warmup 2" in page
    assert f"{figures['parameters']:,} parameters" in page
    assert "\nOf this run:\n\n- stopped once\n\n## Held-out" in page
    assert "Of this run" not in publish.document({**written, "notes": []})
    draw_curve(written, tmp_path / "docs" / "images" / "curve.png")
    assert (tmp_path / "docs" / "images" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_publish_says_what_a_run_started_from(folder, tmp_path, monkeypatch):
    (folder / "heapq.py").write_text("def heappush(heap, item):\n    heap.append(item)\n" * 30)
    monkeypatch.setattr("tidar_kernels.models.training.data.stdlib_folder", lambda: folder)
    first = Trainer(TINY, Corpus())
    first.run(tmp_path / "first")
    init = tmp_path / "first" / "model.safetensors"
    second = Trainer(changed(seed=1), Corpus(), init=load_checkpoint(init))
    second.run(tmp_path / "second")
    from_state = publish.publish(tmp_path / "second", tmp_path / "shipped")
    # An older state does not say it; then publish is told.
    state = read_state(tmp_path / "second")
    del state["init"]
    torch.save(state, tmp_path / "second" / "state.pt")
    assert publish.publish(tmp_path / "second", tmp_path / "shipped")["init"] is None
    told = publish.publish(tmp_path / "second", tmp_path / "shipped", init=init)
    assert told["init"] == from_state["init"] == weights_sha256(load_checkpoint(init))
    page = publish.document(told)
    assert f"| first weights | of an earlier run, sha256 of their values `{told['init'][:16]}...` |" in page
    assert "tidar-kernels train --out runs/stdlib --init FIRST.safetensors --steps 6" in page
    assert "trained further with the TiDAR objective" in page
    assert "The seed fixes every window of text." in page
