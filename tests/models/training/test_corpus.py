"""Training's text: which files it is, what is held out, and which windows of it a step sees."""

from __future__ import annotations

import pytest
import torch

from tidar_kernels.models.tokenizer import EOS_ID
from tidar_kernels.models.training.data import (
    HELD_OUT,
    Corpus,
    TextFiles,
    folder_files,
    held_out_texts,
    stdlib_files,
    stdlib_folder,
)


def test_which_files_of_a_standard_library_are_trained_on(folder, tmp_path):
    found = stdlib_files(folder)
    assert found.training == ("alpha.py", "pack/beta.py", "pack/heapq.py")
    assert found.held_out_texts() == {"heapq.py": b"HELD OUT"}
    with pytest.raises(FileNotFoundError, match=r"folder: expected \.py files"):
        stdlib_files(tmp_path / "empty")


def test_held_out_modules_exist_and_are_in_no_training_text():
    names = stdlib_files().training
    assert len(names) > 300
    assert not set(names) & set(HELD_OUT)
    texts = held_out_texts()
    assert tuple(texts) == HELD_OUT
    everything = b"\0".join((stdlib_folder() / name).read_bytes() for name in names)
    for name, text in texts.items():
        # A stretch from the middle of the code: a copy under another name would be a leak too.
        middle = text[len(text) // 2 : len(text) // 2 + 200]
        assert middle not in everything, name


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() + b"\xff\xfe" * 50)


def test_held_out_files_of_a_folder_are_a_fixed_choice(tmp_path):
    write(tmp_path, *(f"sub{i % 3}/{i}.txt" for i in range(200)), "a.py", ".hidden.txt", ".git/b.txt")
    (tmp_path / "folder.txt").mkdir()
    found = folder_files(tmp_path, [".txt"])
    everything = {*found.training, *found.held_out}
    assert everything == {f"sub{i % 3}/{i}.txt" for i in range(200)}
    assert len(found.training) + len(found.held_out) == 200
    assert 3 <= len(found.held_out) <= 20
    assert folder_files(tmp_path, [".txt"]) == found == TextFiles.from_record(found.record())
    # A file stays on its side whatever comes or goes.
    (tmp_path / found.training[0]).unlink()
    write(tmp_path, "more.txt")
    assert set(folder_files(tmp_path, [".txt"]).held_out) - {"more.txt"} == set(found.held_out)
    assert set(folder_files(tmp_path, [".txt", ".py"]).training) > {"a.py"}
    # Bytes that are no text are fine.
    assert (
        Corpus(found if (tmp_path / found.training[0]).exists() else folder_files(tmp_path, [".txt"])).tokens.max()
        == EOS_ID
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_small_folder_has_files_on_both_sides(tmp_path, count):
    """Whatever their names hash to: among these there are folders without a file that the hash alone would choose."""
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        write(folder, *(f"{attempt}-{i}.py" for i in range(count)))
        found = folder_files(folder)
        assert found.training
        assert found.held_out
        assert len(found.training) + len(found.held_out) == count


def test_not_all_of_a_folder_is_held_out(tmp_path, monkeypatch):
    write(tmp_path, "a.py", "b.py", "c.py")
    monkeypatch.setattr("tidar_kernels.models.training.data._hash", lambda name: 0)
    assert len(folder_files(tmp_path).training) == 1


def test_named_held_out_files(tmp_path):
    write(tmp_path, "a.py", "b.py", "sub/c.py")
    assert folder_files(tmp_path, held_out=["./sub/c.py"]).training == ("a.py", "b.py")
    for held_out, match in (
        (["d.py"], r"held_out: expected names of \.py files in .*, got d\.py"),
        (["a.py", "b.py", "sub/c.py"], "held_out: expected some of the 3 files"),
    ):
        with pytest.raises(ValueError, match=match):
            folder_files(tmp_path, held_out=held_out)
    with pytest.raises(FileNotFoundError, match=r"folder: expected \.md, \.txt files in .*, got none"):
        folder_files(tmp_path, [".md", ".txt"])
    with pytest.raises(FileNotFoundError, match=r"folder: expected a folder, got .*nowhere"):
        folder_files(tmp_path / "nowhere")
    write(tmp_path, "only.md")
    with pytest.raises(ValueError, match=r"folder: expected two or more \.md files .*, one to hold out, got only\.md"):
        folder_files(tmp_path, [".md"])


def test_corpus_joins_files_with_end_of_text(folder, corpus):
    texts = [(folder / name).read_bytes() for name in corpus.files.training]
    assert corpus.tokens.tolist() == [token for text in texts for token in [*text, EOS_ID]]
    assert corpus.num_files == 3
    assert corpus.sha256 == Corpus(corpus.files).sha256
    (folder / "alpha.py").write_text("changed")
    assert corpus.sha256 != Corpus(corpus.files).sha256


def test_windows_are_a_function_of_their_number_and_cover_evenly(corpus):
    many = corpus.windows(0, 64, 9, seed=3)
    assert many.dtype == torch.int64
    assert torch.equal(corpus.windows(10, 5, 9, seed=3), many[10:15])
    assert not torch.equal(corpus.windows(0, 64, 9, seed=4), many)
    text = corpus.tokens.tolist()
    assert all(any(text[i : i + 9] == w for i in range(len(text) - 8)) for w in many.tolist())
    with pytest.raises(ValueError, match=f"length: expected <= {len(text)} tokens of corpus, got {len(text) + 1}"):
        corpus.windows(0, 1, len(text) + 1, seed=0)


def test_window_starts_are_even(corpus):
    corpus.tokens = torch.arange(1000).numpy()  # a window's first token is now where it starts
    starts = corpus.windows(0, 500, 1, seed=0)[:, 0]
    counts = torch.histc(starts.float(), bins=20, min=0, max=1000)
    assert counts.min() >= 23
    assert counts.max() <= 27
    assert len(set((starts % 8).tolist())) == 8
