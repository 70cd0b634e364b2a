"""`tk.attention`: api (checks, schema, gradient), reference, cpu, triton_forward, triton_backward, gluon_forward."""

from __future__ import annotations

from .api import attention

__all__ = ["attention"]
