"""How the package's own decoder is trained and measured; `tidar-kernels train` is this from the shell.

    config.py     every setting of a run
    data.py       its text
    trainer.py    the run itself, its checkpoints
    parallel.py   the same on several processes
    progress.py   the line that it shows
    evaluate.py   what a model is worth on held-out text
    report.py     figures and loss curve
    adapter.py    a gated adapter for the shipped model
    publish.py    a finished run becomes the shipped model and its page in the docs

Nothing is imported here: the command makes its options from `config`, which needs no PyTorch.
"""
