"""`tk.append_kv`, `tk.compact_kv`, `tk.rotary_append`: api, reference, triton."""

from __future__ import annotations

from .api import append_kv, compact_kv, rotary_append

__all__ = ["append_kv", "compact_kv", "rotary_append"]
