"""The OpenAI-compatible server that `tidar-kernels serve` starts, as a process of its own, and its metrics."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import engines

__all__ = ["Server", "serving"]

STARTS_WITHIN = 600  # seconds; three processes import vLLM, one after the other


class Server(NamedTuple):
    """One that answers: where, its first process, and its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metrics(self) -> dict[str, float]:
        """What `/metrics` says of drafts: sums over engines, by the counter's name and its label `position`."""
        page = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()
        found: dict[str, float] = {}
        for line in page.splitlines():
            name, _, rest = line.partition("{")
            if name.startswith("vllm:spec_decode_") and name.endswith("_total"):
                labels, _, value = rest.partition("} ")
                place = next((label.split('"')[1] for label in labels.split(",") if label.startswith("position")), "")
                key = name.removeprefix("vllm:spec_decode_").removesuffix("_total") + place
                found[key] = found.get(key, 0.0) + float(value)
        return found


@contextmanager
def serving(
    checkpoint: Path, log: Path, *words: str, environment: Mapping[str, str] | None = None, **more: Any
) -> Iterator[Server]:
    """A server on a free port.

    Args:
        words: for the command line.
        environment: more of its variables.
        more: arguments of vLLM's, in place of the tests' usual ones.

    Raises:
        AssertionError: it did not start, or ended before its time; with its log's last lines.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {name: value for name, value in engines.ENGINE.items() if name != "max_num_seqs"}
    settings |= {"port": port, "host": "127.0.0.1", "served_model_name": "shipped"} | more
    given = [name if value is True else f"{name}={value}" for name, value in settings.items()]
    options = [word for pair in given for word in ("--set", pair.replace("_", "-", pair.partition("=")[0].count("_")))]
    variables = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} | dict(environment or {})
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidar_kernels", "serve", str(checkpoint), "--max-num-seqs", "4", *words, *options],
            stdout=file, stderr=subprocess.STDOUT, env=variables,
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait(server)
        yield server
        assert process.poll() is None, log.read_text()[-4000:]
    finally:
        process.terminate()
        process.wait(60)


def _wait(server: Server) -> None:
    for _ in range(STARTS_WITHIN):
        if server.process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()[-4000:]}")
