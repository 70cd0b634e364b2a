"""Training beyond one device: the rows of a pattern sharded, the keys gathered.

sharding.py            which rows are whose: equal numbers, equal work
collectives.py         gathering shards, and its transpose
context_parallel.py    `ContextParallel`: attention of local rows over everybody's keys
"""

from __future__ import annotations

from .context_parallel import ContextParallel, shared_out

__all__ = ["ContextParallel", "shared_out"]
