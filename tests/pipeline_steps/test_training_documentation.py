"""docs/training.md names every parameter of training, docs/metrics.md every column of its curve."""

import re

import pytest

from pipeline_steps.common.params import ROOT
from pipeline_steps.training.__main__ import COLUMNS
from pipeline_steps.training.schema import Common, Stage, Watch

ROWS = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/training.md").read_text(), re.MULTILINE)
NAMES = {name for row in ROWS for name in re.findall(r"`(\w+)`", row)}


@pytest.mark.parametrize("section", [Stage, Common, Watch])
def test_every_parameter_stands_in_a_table(section):
    assert set(section.model_fields) <= NAMES


def test_every_scale_stands_in_the_table():
    scales = {path.stem for path in (ROOT / "conf/scale").glob("*.yaml")} - {"none"}
    assert scales <= NAMES


def test_every_row_is_a_parameter_or_a_scale():
    known = {*Stage.model_fields, *Common.model_fields, *Watch.model_fields}
    assert NAMES - known <= {path.stem for path in (ROOT / "conf/scale").glob("*.yaml")}


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_explained(column):
    text = (ROOT / "docs/metrics.md").read_text()
    start = text.index("## outputs/metrics/stage1.csv")
    group = re.sub(r"^(lr|grad_norm)_\w+$", r"\1", column)
    assert re.search(rf"`{group}(_\*)?`", text[start:]), column
