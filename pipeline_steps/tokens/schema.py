"""Parameters of the `tokens` stage (section `tokens` of params.yaml)."""

from collections import Counter
from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from pipeline_steps.common.params import StrictModel

ALL = "*"  # the entry of every source that has none of its own
Line = Annotated[str, Field(min_length=1)]


class Prompt(StrictModel):
    """Prompt lines for the items of a source that have none. null: as in the entry of source "*"."""

    source: Line
    """`*`: all others."""
    system: str | None
    """Default system line; `""`: the chat template's."""
    video: Line | None
    """Default user line."""
    image: Line | None
    """Default user line."""
    choice: str | None
    """Line after the options."""


class Section(StrictModel):
    max_tokens: PositiveInt
    """Longest chat without visual tokens."""
    max_dropped: float = Field(ge=0, le=1)
    """Dropped share of a source."""
    prompts: tuple[Prompt, ...]
    """A null field takes its value from the entry `*`."""

    @model_validator(mode="after")
    def _whole_table(self):
        twice = sorted(name for name, count in Counter(entry.source for entry in self.prompts).items() if count > 1)
        if twice:
            raise ValueError(f"prompts has two entries for source '{twice[0]}'")
        common = next((entry for entry in self.prompts if entry.source == ALL), None)
        if common is None:
            raise ValueError(f"prompts has no entry for source '{ALL}', which the other entries fall back to; add one")
        empty = [name for name, value in common.model_dump().items() if value is None]
        if empty:
            raise ValueError(f"prompts: the entry of source '{ALL}' must not leave out {', '.join(empty)}")
        return self

    def prompt(self, source: str) -> Prompt:
        """The lines for a source, none of them null."""
        entries = {entry.source: entry for entry in self.prompts}
        own = entries[source].model_dump(exclude_none=True) if source in entries else {}
        return entries[ALL].model_copy(update=own | {"source": source})
