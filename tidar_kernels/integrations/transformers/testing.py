"""A pytest plugin: tests written for `"sdpa"`, such as transformers' own, run under `"tidar"`.

    python -m pytest -p tidar_kernels.integrations.transformers.testing tests/models/llama/test_modeling_llama.py

Every model that would get `"sdpa"`, by default or by name, gets `"tidar"`; what is asked of others (`"eager"`, flash
attention) stays. The report of a test has the property `tidar_calls`: how often its uncompiled layers called the
attention of `"tidar"` (in `--junitxml`), and the summary says in how many tests that was the case at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel

from .attention import NAME, register, tidar_attention_forward

__all__ = ["SdpaAsTidar"]


class SdpaAsTidar:
    """The plugin's hooks, and what they count.

    Attributes:
        calls: of the attention, in the test that runs.
        tests: how many tests called it so far.
    """

    def __init__(self) -> None:
        self.calls = self.tests = 0
        asked = PreTrainedModel.get_correct_attn_implementation

        def resolved(model: PreTrainedModel, *args: Any, **kwargs: Any) -> str:
            found = asked(model, *args, **kwargs)
            return NAME if found == "sdpa" else found

        self._patch = mock.patch.object(PreTrainedModel, "get_correct_attn_implementation", resolved)

    def attention(self, *args: Any, **kwargs: Any) -> Any:
        """`tidar_attention_forward`, counted."""
        if not torch.compiler.is_compiling():
            self.calls += 1
        return tidar_attention_forward(*args, **kwargs)

    def install(self) -> None:
        """Put `"tidar"` in the place of `"sdpa"`, in models made from now on."""
        self._patch.start()
        AttentionInterface.register(NAME, self.attention)

    def remove(self) -> None:
        """Take `install` back."""
        self._patch.stop()
        register()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.calls = 0
        try:
            return (yield)
        finally:
            self.tests += self.calls > 0
            item.user_properties.append(("tidar_calls", self.calls))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f'tests that ran attention under "{NAME}": {self.tests}')

    def pytest_unconfigure(self) -> None:
        self.remove()


def pytest_configure(config: pytest.Config) -> None:
    plugin = SdpaAsTidar()
    plugin.install()
    config.pluginmanager.register(plugin, "sdpa-as-tidar")
