"""docs/vllm.md: each test that it names exists."""

from __future__ import annotations

import re

from tests.paths import REPOSITORY


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (REPOSITORY / "docs" / "vllm.md").read_text(encoding="utf-8"))
    assert len(named) > 5
    for file, name in named:
        text = (REPOSITORY / "tests/integrations/vllm" / file).read_text(encoding="utf-8")
        assert re.search(rf"^ *def {name}\(", text, re.MULTILINE), f"{file}::{name}"
