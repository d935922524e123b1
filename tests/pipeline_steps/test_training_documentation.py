"""docs/training.md lists every scale, docs/metrics.md every column of a training curve."""

import re

import pytest

from pipeline_steps.common.params import ROOT
from pipeline_steps.training.__main__ import COLUMNS


def test_the_documented_scales_match_conf():
    section = (ROOT / "docs/training.md").read_text().split("\n## Scales\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(`.+?)\|", section, re.MULTILINE)
    written = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert written == {path.stem for path in (ROOT / "conf/scale").glob("*.yaml")} - {"none"}


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_documented(column):
    text = (ROOT / "docs/metrics.md").read_text()
    section = text.split("## outputs/metrics/stage1.csv")[1].split("\n## ")[0]
    group = re.sub(r"^(lr|grad_norm)_\w+$", r"\1", column)
    assert re.search(rf"`{group}(_\*)?`", section), column
