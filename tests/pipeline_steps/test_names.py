"""Names from data are harmless in files, tables, figures and terminals, and bad ones stop at the sources stage."""

import pytest
from matplotlib import pyplot as plt

from pipeline_steps.common.errors import UserError, printable, run_main
from pipeline_steps.common.names import without_math
from pipeline_steps.common.schemas import RawSample
from pipeline_steps.report.tables import Table
from pipeline_steps.sources.index import open_index

GOOD = ["card", "ask_colour", "What's next?", "MVBench: action sequence (v1.2)", "Schätzung", "問題", "a/b", "1.5"]
BAD = ["", " card", "x" * 101, "a\x1b[31mred", "two\nlines", "$\\frac{a}{b}$", "<img src=x>", "[x](http://y)", "a|b",
       "a\u202eb", "**", "`rm`", "a\u2028b", "\x00"]  # fmt: skip


def sample(**changes):
    row = {"key": "own-1", "source": "own", "video_id": "1", "kind": "text"} | changes
    return RawSample(**{"items": ({"user": "?", "assistant": "a", "task": row.pop("task", "card")},)} | row)


@pytest.mark.parametrize("name", GOOD)
def test_ordinary_names_are_taken(name, tmp_path):
    with open_index(tmp_path) as index:
        index.add_source("own", [sample(task=name)], [], 0.0)
        assert index.finish()["sources"]["own"]["items"] == {name: 1}


@pytest.mark.parametrize("kind", ["task", "source"])
@pytest.mark.parametrize("name", BAD)
def test_names_with_a_meaning_elsewhere_stop_the_sources_stage(name, kind, tmp_path):
    with open_index(tmp_path) as index, pytest.raises(UserError, match=f"sample 'own-1': the {kind} ") as error:
        index.add_source("own", [sample(**{kind: name})], [], 0.0)
    assert str(error.value).isprintable()


def test_the_number_of_names_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline_steps.sources.index.MAX_NAMES", 5)
    with open_index(tmp_path) as index, pytest.raises(UserError, match="more than 5 different names"):
        index.add_source("own", [sample(key=f"own-{n}", task=f"task {n}") for n in range(9)], [], 0.0)


def test_errors_show_control_characters_and_do_not_send_them(capsys):
    def main():
        raise UserError("a\x1b]0;title\x07b\n\tc \u202e")

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == "error: a\\x1b]0;title\\x07b\n\tc \\u202e\n"
    assert printable("問題") == "問題"


def test_figures_show_dollar_signs_and_typeset_nothing():
    figure = plt.figure()
    text = figure.text(0, 0, without_math(r"$\frac{a}{b}$ 5$"))
    figure.canvas.draw()  # would raise for r"$\nonsense$"
    figure.text(0, 0, without_math(r"$\nonsense{$"))
    figure.canvas.draw()
    assert text._preprocess_math(text.get_text()) == (r"$\frac{a}{b}$ 5$", False)
    plt.close(figure)


def test_cells_of_markdown_tables_are_inert():
    rows = [["<script>x</script>", "[a](http://b)", "a|b", "$x$", "`c`", "two\nlines", "**b**"]]
    (line,) = [line for line in Table("t", "T", list("1234567"), rows).markdown().split("\n") if "script" in line]
    assert line == r"| \<script>x\</script> | [a]\(http://b) | a\|b | \$x\$ | \`c\` | two lines | \*\*b\*\* |"
    plain = [["82.5% [80–85]", "< 0.5", "ask_colour"]]
    assert "| 82.5% [80–85] | < 0.5 | ask_colour |" in Table("t", "T", list("123"), plain).markdown()
