"""Tables, sentences and figure of compute, from counts of the pretrained sizes."""

import re

import pytest

from pipeline_steps.common.flop_results import Crossover, FlopsResult, Frontier
from pipeline_steps.report import compute, figures
from tests.pipeline_steps.counted import flops_result


@pytest.fixture(scope="module")
def result():
    return flops_result()


def test_the_result_round_trips_through_json(result):
    assert FlopsResult.model_validate_json(result.model_dump_json()) == result


def test_budget_rows_divide_the_budget_by_the_cost_of_a_sample(result):
    rows = compute.budgets(result).rows
    assert len(rows) == 4 * 3 * 2
    first = rows[0]
    assert [first[1], first[2], first[4][0]] == ["135M", "foveated", "40,554"]
    assert first[4][1] == pytest.approx(first[0][1] / (first[3][1] * 1e9), rel=0.01)


def test_tables_of_answers_and_passes(result):
    rows = {row[0]: row for row in compute.answers(result).rows}
    assert list(rows) == ["foveated", "A6 coarse only", "B1 16 tokens"]
    own = result.answers["foveated"]
    assert rows["foveated"][4][1] == pytest.approx(own.total / 1e6)
    assert rows["B1 16 tokens"][6] == ("0 KiB", 0)
    fine = next(row for row in compute.passes(result).rows if row[0] == "fine")
    assert fine[4][1] + fine[5][1] == pytest.approx(result.modes["fine"].components.language_model / 1e6)


def test_statements_name_the_break_even_and_the_share_of_vision(result):
    curve = {"num_frames": [1, 2, 4], "foveated": [4.0, 4.0, 4.0], "multi_token": [2.0, 5.0, 8.0]}
    training = {"foveated_training": [4.0, 4.0, 4.0], "multi_token_training": [2.0, 3.0, 2.0]}
    rest = {"vision_share": [0.2, 0.3, 0.6], "cheaper_from": 2, "cheaper_training_from": None}
    changed = result.model_copy(update={"frontier": {"360M": Frontier(**curve, **training, **rest)}})
    assert compute.statements(changed) == [
        "360M: one token per frame costs less than 16 from 2 frames on at inference and at no number of frames "
        "up to 4 in training. At 4 frames it costs 50% less at inference. The vision encoder takes more than half of "
        "the cost from 4 frames on."
    ]


def test_statements_begin_with_a_capital_or_a_number(result):
    starts = [line.split(":")[0] for line in compute.statements(result)]
    assert starts == ["This network", "135M", "360M", "1.7B"]


def test_the_table_of_crossovers_shows_every_length_and_says_never(result):
    found = {"max_num_frames": 64, "training": 1}
    short = {"num_tokens_before": 64, "num_text_tokens": 96, **found}
    long = {"num_tokens_before": 2000, "num_text_tokens": 2032, **found}
    crossovers = {
        "360M": [Crossover(inference=4, **short), Crossover(inference=None, **long)],
        "135M": [Crossover(inference=3, **short), Crossover(inference=50, **long)],
    }
    changed = result.model_copy(update={"crossovers": crossovers})
    table = compute.crossovers(changed)
    assert table.columns == ["language model", "FLOPs of", "64 text tokens", "2,000 text tokens"]
    assert table.rows == [
        ["135M", "inference", ("3", 3), ("50", 50)],
        ["135M", "training", ("1", 1), ("1", 1)],
        ["360M", "inference", ("4", 4), ("never", None)],
        ["360M", "training", ("1", 1), ("1", 1)],
    ]
    assert "than 16 pooled ones" in table.note
    assert "32 more follow the frames" in table.note
    assert "Never: at no number of frames up to 64." in table.note
    assert "reads the question twice and 16 tokens once" in table.note


def test_crossovers_agree_with_the_statements_at_the_same_text(result):
    for name, entry in result.frontier.items():
        found = result.crossovers[name][0]
        text = result.assumptions["frontier"]
        assert found.num_tokens_before == text["num_tokens_before"]
        assert found.num_text_tokens == text["num_text_tokens"]
        assert (found.inference, found.training) == (entry.cheaper_from, entry.cheaper_training_from)


def test_the_frontier_figure_shows_every_size_and_is_deterministic(result):
    drawn = [figures.svg(*compute.frontier(result)) for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"light", "dark"}
    for theme, text in drawn[0].items():
        assert all(colour in text for colour in compute.COLOURS.values())
        assert not re.search(r"nan", text, re.IGNORECASE)
        for colours in (figures.INK, figures.FAINT):
            assert [name for name, colour in colours.items() if colour in text] == [theme]
