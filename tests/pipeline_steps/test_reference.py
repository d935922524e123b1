"""The generated pages of docs/ are up to date and complete."""

import itertools
import re

import pytest

from pipeline_steps.common import metrics, params, reference
from pipeline_steps.common.errors import UserError


def test_generated_pages_are_up_to_date():
    assert reference.outdated() == [], f"run `{reference.COMMAND}`"


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
