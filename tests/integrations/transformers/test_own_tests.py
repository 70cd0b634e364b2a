"""Counting the reports of transformers' own tests, and what is recorded of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.core import record
from tests.integrations.transformers import own_tests

CASES = """<testsuites><testsuite>
<testcase classname="tests.LlamaModelTest" name="a">
<properties><property name="tidar_calls" value="3"/></properties></testcase>
<testcase classname="tests.LlamaModelTest" name="b">
<properties><property name="tidar_calls" value="0"/></properties></testcase>
<testcase classname="tests.LlamaModelTest" name="c"><failure message="no"/></testcase>
<testcase classname="tests.Qwen3ModelTest" name="d"><skipped/></testcase>
<testcase classname="tests.Other" name="e"/>
</testsuite></testsuites>"""


def test_reports_are_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(CASES)
    assert own_tests.main(["--out", str(tmp_path), f"1.2,all,{report},{report}"]) == 0
    (part,) = record.newest(tmp_path, "own_tests")
    assert [row["implementation"] for row in part["rows"]] == ["sdpa", "sdpa", "tidar", "tidar"]
    llama, qwen = part["rows"][2:]
    assert (llama["passed"], llama["failed"], llama["skipped"], llama["on_kernels"]) == (2, 1, 0, 1)
    assert (qwen["passed"], qwen["failed"], qwen["skipped"], qwen["on_kernels"]) == (0, 0, 1, 0)


@pytest.mark.parametrize("content", [None, "not XML", "<testsuites/>"])
def test_bad_reports_record_nothing(tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.xml"
    if content is not None:
        report.write_text(content)
    assert own_tests.main(["--out", str(tmp_path / "out"), f"1.2,all,{report},{report}"]) == 2
    assert f"error: {report}: expected " in capsys.readouterr().err
    assert own_tests.main(["--out", str(tmp_path / "out"), "1.2,all"]) == 2
    assert not (tmp_path / "out").exists()
