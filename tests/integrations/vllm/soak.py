"""A server under random requests for a while: `python -m tests.integrations.vllm.soak --seconds 600`.

Clients complete, stream, cancel, and ask what is refused, several at once. Every text that is not cancelled must be
vLLM's own without drafts, nothing may be lost, and the memory of the server's processes must stay where it was after
the first tenth of the time. Prints one line a minute and a JSON object at the end, which `--out` puts into a results
file for docs/vllm.md; exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from benchmarks.core import record
from tidar_kernels.integrations.vllm.plugin import installed_version

from . import engines
from .checkpoints import shipped
from .engines import DEFAULTS, cases
from .server import Server, serving

NAMES = ("greedy", "sampled", "filters", "long", "stopped", "ragged")
# vLLM's own parameters go in the body: the client does not know them.
VLLMS = ("top_k", "min_p", "repetition_penalty", "stop_token_ids")
SPARE = 1.05  # memory may grow by allocators' slack


class Soak:
    """Counts of what clients saw, and every fault."""

    def __init__(self, server: Server, expected: list[tuple[Any, str]], ends: float) -> None:
        self.server, self.expected, self.ends = server, expected, ends
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """Ask until the end."""
        rng = random.Random(seed)
        with openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            while time.monotonic() < self.ends:
                kind = rng.choices(["complete", "stream", "cancel", "refused"], [6, 4, 2, 1])[0]
                ask, text = rng.choice(self.expected)
                try:
                    fault = self._ask(client, kind, ask, text)
                except Exception as error:  # whatever it is, it is a fault, and the others go on
                    fault = f"{kind}: {type(error).__name__}: {error}"
                with self._lock:
                    self.counts[kind] += 1
                    if fault:
                        self.faults.append(fault)

    def _ask(self, client: openai.OpenAI, kind: str, ask: Any, text: str) -> str | None:
        if kind == "refused":
            try:
                client.completions.create(model="shipped", prompt=ask.prompt, max_tokens=10**6)
            except openai.BadRequestError:
                return None
            return "refused: a request of 10^6 tokens was taken"
        params = DEFAULTS | ask.params
        body = {name: params.pop(name) for name in VLLMS if name in params}
        settings: dict[str, Any] = {"model": "shipped", "prompt": ask.prompt, "extra_body": body} | params
        if kind == "complete":
            got = client.completions.create(**settings).choices[0].text
            return None if got == text else f"complete: expected {text!r}, got {got!r}"
        got = ""
        with client.completions.create(**settings, stream=True) as stream:
            for chunk in stream:
                got += chunk.choices[0].text
                if kind == "cancel":
                    break
        right = text.startswith(got) if kind == "cancel" else text == got
        return None if right else f"{kind}: expected {text!r}, got {got!r}"


def memory(pid: int) -> int:
    """Resident bytes of a process and all that it started."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True, check=True)
    rows = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()[1:]]
    family, size = {pid}, -1
    while size != len(family):
        size = len(family)
        family |= {child for child, parent, _ in rows if parent in family}
    return 1024 * sum(rss for process, _, rss in rows if process in family)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = shipped(Path(folder) / "shipped")
        with engines.running(**engines.plain(checkpoint), max_num_batched_tokens=512) as llm:
            asked = [ask for name in NAMES for ask in cases()[name]]
            expected = [(ask, out.outputs[0].text) for ask, out in zip(asked, engines.answers(llm, asked), strict=True)]
        with serving(checkpoint, Path(folder) / "log") as server:
            report = run(server, expected, args)
    print(json.dumps(report, indent=1))
    if args.out is not None:
        command = f"python -m tests.integrations.vllm.soak --seconds {args.seconds:.0f} --clients {args.clients}"
        common = {"operator": "vllm_soak", "vllm": installed_version(), "clients": args.clients, "command": command}
        record.add(args.out, "vllm_soak", "cpu", [common | report])
    return 1 if report["faults"] or not report["memory_is_flat"] else 0


def run(server: Server, expected: list[tuple[Any, str]], args: argparse.Namespace) -> dict[str, Any]:
    begun = time.monotonic()
    soak = Soak(server, expected, begun + args.seconds)
    clients = [threading.Thread(target=soak.client, args=(args.seed + n,)) for n in range(args.clients)]
    for client in clients:
        client.start()
    resident: list[int] = []
    while any(client.is_alive() for client in clients):
        time.sleep(args.seconds / 40)
        resident.append(memory(server.process.pid))
        if len(resident) % 4 == 0:
            print(f"{time.monotonic() - begun:.0f} s: {sum(soak.counts.values())} requests, {len(soak.faults)} wrong, "
                  f"{resident[-1] / 2**20:.0f} MiB", file=sys.stderr)  # fmt: skip
    settled = max(resident[2:6] or resident)
    drafts = server.metrics()
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "requests": dict(soak.counts),
        "tokens_per_step": round(1 + drafts["num_accepted_tokens"] / max(drafts["num_drafts"], 1), 3),
        "memory_mib": [round(settled / 2**20), round(resident[-1] / 2**20)],
        "memory_is_flat": resident[-1] <= SPARE * settled,
        "faults": soak.faults[:20],
    }


if __name__ == "__main__":
    raise SystemExit(main())
