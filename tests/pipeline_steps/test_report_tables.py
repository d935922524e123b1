"""The report's tables and curves on invented results, and its Markdown form."""

import re
import subprocess

import pytest

from pipeline_steps.common import metrics
from pipeline_steps.common.errors import UserError
from pipeline_steps.report import controls, curves, markdown, reading
from pipeline_steps.report.inputs import CURVE_COLUMNS, read_inputs
from pipeline_steps.report.tables import text_of
from tests.pipeline_steps.reported import (
    TASKS,
    build,
    curve_table,
    given,
    item_table,
    result_of,
    streaming_result,
    write_root,
)


def test_read_samples_are_counted_and_unmatched_items_listed(built):
    table = reading.reading(streaming_result())
    assert [row[:3] for row in table.rows] == [
        ["stage1", "chat", "text"],
        ["stage1", "procedural", "card"],
        ["stage1, all", "", ""],
    ]
    assert table.summary == [2]
    assert [cell[1] for cell in table.rows[1][3:]] == [40, 86, 0.86, 2.15, 516, 2580, 516, 3]
    assert table.note.endswith("stage1: procedural/gist (7).")
    text = (built[0] / "reports/tables/reading.md").read_text()
    assert "| stage1 | procedural | card | 40 | 86 | 86.0% | 2.15 | 516 | 2,580 | 516 | 3 |" in text


def test_samples_and_items_of_every_source_are_counted(tmp_path):
    write_root(tmp_path)
    inputs = read_inputs(tmp_path, given())
    assert [text_of(cell) for cell in reading.sources(inputs.shards, inputs.tokens).rows[0]] == [
        *("folder", "9", "1", "9", "9", "0", "0", "99"),
    ]


def test_curves_are_per_task_and_per_source_where_a_task_has_several():
    one = curves.task_lines({"stage1": curve_table(), "stage2": curve_table()})
    assert list(one) == sorted(TASKS)
    assert [stage for stage, _ in one["card"]] == ["stage1", "stage2"]
    two = curves.task_lines({"stage1": curve_table(("chat", "procedural"))})
    assert list(two) == [f"{source}/{task}" for source in ("chat", "procedural") for task in sorted(TASKS)]
    assert two["chat/card"][0][1]["step"].tolist() == [20, 40, 59]


def test_validations_are_drawn_at_their_cumulative_samples():
    timeline = curves.Timeline({"stage1": curve_table(), "stage2": curve_table()})
    assert timeline.position("stage1", [20]).tolist() == [640]
    assert timeline.position("stage2", [40]).tolist() == [59 * 32 + 1280]


def test_attention_is_drawn_for_networks_with_queries_and_warnings_are_listed(built):
    assert curves.attention({"stage1": curve_table()}) is not None
    table = curve_table()
    assert curves.attention({"stage1": table[table["event"] != "diagnostics"]}) is None
    assert "stage2, step 59: uniform attention: &lt;nothing&gt; is chosen" in built[1]


def test_a_metrics_table_without_a_column_is_an_error_that_names_it(tmp_path):
    write_root(tmp_path)
    table = curve_table(columns=[name for name in CURVE_COLUMNS if name != "source"])
    table.to_csv(tmp_path / "outputs/metrics/stage2.csv", index=False)
    with pytest.raises(UserError, match=r"stage2.csv: no column source.*dvc repro stage2"):
        read_inputs(tmp_path, given())


def test_control_costs_are_points_of_accuracy():
    result = result_of(item_table())
    table = controls.costs(result)
    assert table.columns == ["task", "autoregressive", "blind", "random query"]
    expected = 100 * (result.tasks["card"]["blind"].accuracy - result.tasks["card"]["autoregressive"].accuracy)
    row = next(row for row in table.rows if row[0] == "card")
    assert row[2] == (f"−{-expected:.1f}", pytest.approx(expected))


def test_markdown_has_the_content_of_the_page_and_its_links_exist(built):
    root, page = built
    text = (root / "reports/report.md").read_text()
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == re.findall(r"<h2>(.*?)</h2>", page)
    links = re.findall(r"""(?:src|srcset)="([^"]+)"|\]\(([^)]+)\)""", text)
    paths = [first or second for first, second in links]
    assert len(paths) >= 12
    assert all((root / "reports" / path).exists() for path in paths)
    for table in (root / "reports/tables").glob("*.md"):
        rows = [line for line in table.read_text().split("\n") if line.startswith("| ")]
        assert all(row in text for row in rows), table.name
    assert "Which \\<b\\>?" in text


def test_the_report_does_not_depend_on_folder_commit_or_date(built, tmp_path, monkeypatch):
    write_root(tmp_path)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    (tmp_path / "outputs/timings").mkdir()
    (tmp_path / "outputs/timings/stage1.json").write_text('{"seconds": 7, "samples_per_second": 3, "device": "cpu"}')
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "2000000000")
    build(tmp_path, monkeypatch)
    first, second = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("reports/**/*") if path.is_file()}
        for root in (built[0], tmp_path)
    )
    assert len(first) > 30
    assert first == second


def test_markdown_escapes_markup_in_data():
    assert markdown.escaped("a|b\n<c>_d &lt;") == "a\\|b \\<c\\>\\_d &amp;lt;"


def test_paired_controls_have_intervals():
    control = metrics.Control(
        loss_difference=1.0,
        loss_interval=(0.9, 1.1),
        accuracy_difference=-0.5,
        accuracy_interval=(-0.55, -0.4),
        num_items=40,
    )
    result = result_of(item_table()).model_copy(update={"controls": {"card": {"static_query": control}, "gist": {}}})
    table = controls.costs(result)
    assert table.columns == ["task", "autoregressive", "static query"]
    assert table.rows[0][2] == ("−50.0 [−55.0 to −40.0]", -50.0)
    assert table.rows[1][2] == ("–", None)
