"""The programs of docs/extending.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


def test_each_extension_has_a_program() -> None:
    assert list(PROGRAMS) == [f"{what} of your own" for what in ("An objective", "A user encoder", "A modality")]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_of_the_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[name], f"{name}.py", "exec"), {"__name__": "__main__"})
    score, items = capsys.readouterr().out.strip().splitlines()[-2:]
    assert 0 < float(score) < 1 and items.count("Recommendation(") == 3
