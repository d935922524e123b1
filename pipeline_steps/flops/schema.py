"""Parameters of the `flops` stage (section `flops` of params.yaml)."""

from typing import Literal

from pydantic import PositiveInt

from pipeline_steps.params import StrictModel


class Section(StrictModel):
    split: Literal["validation", "test"]  # whose mean frame and token counts are used
    multi_tokens: PositiveInt  # visual tokens per frame of the ordinary model that one foveated token is compared with
