"""The generated pages of docs/ are up to date and complete."""

import pytest

from pipeline_steps.common import metrics, params, reference
from pipeline_steps.common.errors import UserError


def test_generated_pages_are_up_to_date():
    assert reference.outdated() == [], f"run `{reference.COMMAND}`"


def test_every_parameter_of_the_embedded_scale_has_a_row():
    page = reference.parameters_page()

    def leaves(value, prefix=""):
        for key, child in value.items():
            name = f"{prefix}{key}"
            yield from leaves(child, f"{name}.") if isinstance(child, dict) else [name]

    for section, values in params.load(params.ROOT / "params.yaml").items():
        if isinstance(values, dict):
            for name in leaves(values):
                shared = name.replace("stage1.", "stage1/stage2/stage3.")
                if not name.startswith(("stage2.", "stage3.")):
                    assert f"|`{shared}`|" in page, f"{section}.{name}"


def test_a_field_without_a_description_is_refused():
    class Undescribed(metrics.Result):
        number: int

    with pytest.raises(UserError, match=r"Undescribed\.number has no description"):
        reference._meaning(Undescribed, "number")
