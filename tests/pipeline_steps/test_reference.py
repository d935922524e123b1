"""The generated pages of docs/ are up to date and complete."""

import itertools
import re
from typing import Annotated

import pytest
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from pipeline_steps.common import metrics, params, reference
from pipeline_steps.common.errors import UserError


def test_the_pages_are_up_to_date():
    assert list(reference.outdated_pages()) == [], f"run `{reference.COMMAND}`"


def test_every_ablation_has_a_row():
    page = (params.ROOT / "docs/experiments.md").read_text()
    section = page.split("\n## Ablations\n")[1].split("\n## ")[0]
    names = re.findall(r"^\|`(\w+)`\|[A-Z0-9]", section, re.MULTILINE)
    assert sorted(names) == sorted(path.stem for path in (params.ROOT / "conf/ablation").iterdir())


def test_every_key_that_a_study_uses_has_a_row():
    rows = dict(re.findall(r"^\|`([\w.]+)`\|(.*?)\|", reference.study_table(), re.MULTILINE))
    used = set()
    for path in (params.ROOT / "conf/study").iterdir():
        study = params.load(path)
        used |= study.keys()
        for section in ("arms", "budgets"):
            inner = [value for value in study.get(section, {}).values() if isinstance(value, dict)]
            used |= {f"{section}.NAME.{key}" for value in inner for key in value}
    assert {"arms.NAME.rate_factor", "budgets.NAME.flops_of", "budgets.NAME.flops", "headline"} <= used
    assert used - rows.keys() == set()
    assert (rows["question"], rows["margin"], rows["arms.NAME.seeds"]) == ("required", "`0.03`", "`null`")


def test_an_ablation_without_a_description_is_refused(tmp_path):
    (tmp_path / "A1.yaml").write_text("# @package _global_\n# A1, a shallow query.\n")
    assert reference.ablations_table(tmp_path).endswith("|-|-|\n|`A1`|A shallow query.|\n")
    (tmp_path / "A2.yaml").write_text("# @package _global_\nablation: A2\n")
    with pytest.raises(UserError, match=r"A2\.yaml: line 2 is 'ablation: A2', expected a comment"):
        reference.ablations_table(tmp_path)


def test_an_edited_table_is_out_of_date_and_written_again(tmp_path, monkeypatch):
    page = tmp_path / "experiments.md"
    text = reference.EXPERIMENTS.read_text()
    monkeypatch.setattr(reference, "EXPERIMENTS", page)
    monkeypatch.setattr("sys.argv", ["reference", "--check"])
    page.write_text(text.replace("|`A6`|", "|`A66`|"))
    with pytest.raises(UserError, match=r"experiments\.md: out of date\. Run `python"):
        reference.main()
    monkeypatch.setattr("sys.argv", ["reference"])
    reference.main()
    assert page.read_text() == text
    page.write_text(text.replace(reference.END.format("ablations"), ""))
    with pytest.raises(UserError, match=r"put the lines .* where the table belongs"):
        reference.main()


def leaves(value, prefix=""):
    for key, child in value.items():
        if isinstance(child, dict):
            yield from leaves(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_parameter_of_the_embedded_scale_has_a_row():
    page, rows = reference.parameters_page(), {}
    for part in page.split("\n## ")[1:]:
        section = part.split("\n")[0]
        for key in re.findall(r"^\|`(.+?)`\|", part, re.MULTILINE):
            for names in itertools.product(*(component.split("/") for component in key.split("."))):
                rows[".".join([section, *names])] = True
    values = params.load(params.ROOT / "params.yaml")
    expected = {name for name in leaves(values) if "." in name}
    assert len(expected) > 150
    assert expected - set(rows) == set()


def test_a_field_without_a_description_is_refused():
    class Undescribed(metrics.Result):
        number: int

    with pytest.raises(UserError, match=r"Undescribed\.number has no description"):
        reference._meaning(Undescribed, "number")


class Sizes(params.StrictModel):
    width: PositiveInt
    """Size."""
    height: PositiveInt
    """Size."""
    depth: PositiveFloat
    """Size."""
    count: NonNegativeInt | None
    """Size."""
    share: float = Field(ge=0, lt=1)
    """Part."""
    shares: tuple[Annotated[float, Field(gt=0, le=1)], ...]
    """Parts."""


class Pair(params.StrictModel):
    first: Sizes
    second: Sizes


def test_fields_of_one_type_and_description_share_a_row():
    values = {"width": 1, "height": 2, "depth": 3, "count": None, "share": 0.5, "shares": [1.0]}
    assert list(reference._rows(Sizes, values)) == [
        "|`width/height`|>0|`1`, `2`|Size.|",
        "|`depth`|float >0|`3`|Size.|",  # an integer does not show that other numbers are allowed
        "|`count`|int >=0, null|`null`|Size.|",
        "|`share`|[0,1)|`0.5`|Part.|",
        "|`shares`|list of float (0,1]|`[1.0]`|Parts.|",
    ]


def test_sections_of_one_class_share_rows():
    values = {"width": 1, "height": 1, "depth": 3.0, "count": None, "share": 0.5, "shares": [1.0]}
    rows = list(reference._rows(Pair, {"first": values, "second": values | {"depth": 4.0}}))
    assert rows[:2] == ["|`first/second.width/height`|>0|`1`|Size.|", "|`first/second.depth`|>0|`3.0`, `4.0`|Size.|"]


def test_every_field_of_the_result_files_is_explained(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reference", "--results"])
    reference.main()
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("###")] == [f"### {f}" for f in reference.RESULTS]
    for model in reference.RESULTS.values():
        assert all(f"`{name}`" in printed for name in model.model_fields)
    assert "**CaptionStyle**" in printed  # of an object in an object
