"""docs/model.md lists every option with its default."""

import ast
import inspect
import re

import pytest

from model import FoveatedVLMConfig, FoveatedVLMProcessor
from pipeline_steps.common.params import ROOT


@pytest.mark.parametrize(
    ("cls", "title", "left_out"),
    [
        (FoveatedVLMConfig, "Configuration", {"vision_config", "text_config"}),
        (FoveatedVLMProcessor, "Processor", {"tokenizer"}),
    ],
)
def test_every_option_stands_there_with_its_default(cls, title, left_out):
    text = (ROOT / "docs/model.md").read_text()
    section = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(1)
    rows = re.findall(r"^\| `(\w+)` \| (?:`(.+?)`|(required)) \|", section, re.MULTILINE)
    written = {name: inspect.Parameter.empty if required else ast.literal_eval(value) for name, value, required in rows}
    parameters = inspect.signature(cls.__init__).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"}
    assert written == {name: default for name, default in options.items() if name not in left_out}
