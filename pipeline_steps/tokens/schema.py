"""Parameters of the `tokens` stage (section `tokens` of params.yaml)."""

from pydantic import Field, PositiveInt

from pipeline_steps.params import StrictModel


class Prompts(StrictModel):
    """The user's line for a sample that has none."""

    default: str = Field(min_length=1)
    image: str = Field(min_length=1)


class Section(StrictModel):
    max_tokens: (
        PositiveInt  # of an item's whole chat text, visual tokens not counted; longer items are dropped, never cut
    )
    max_dropped: float = Field(ge=0, le=1)  # share of a source's items
    system: str  # "": what the chat template puts there by itself
    prompts: Prompts
