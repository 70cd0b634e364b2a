"""`tk.verify`, `tk.sample`: api (checks, schemas), params, noise, reference, cpu, triton."""

from __future__ import annotations

from .api import RULES, Rule, Verified, sample, verify
from .params import Knob, SamplingParams, SamplingTensors, sampling_tensors

__all__ = [
    "RULES",
    "Knob",
    "Rule",
    "SamplingParams",
    "SamplingTensors",
    "Verified",
    "sample",
    "sampling_tensors",
    "verify",
]
