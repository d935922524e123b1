"""docs/model.md lists every processor option with its default, docs/parameters.md every option of the network."""

import ast
import inspect
import re

from model import FoveatedVLMConfig, FoveatedVLMProcessor
from pipeline_steps.common.params import ROOT


def options(cls):
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"}


def test_every_processor_option_stands_there_with_its_default():
    text = (ROOT / "docs/model.md").read_text()
    section = re.search(r"^## Processor$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL).group(1)
    rows = re.findall(r"^\|`(\w+)`\|(?:`(.+?)`|(required))\|", section, re.MULTILINE)
    written = {name: inspect.Parameter.empty if required else ast.literal_eval(value) for name, value, required in rows}
    assert written == {name: value for name, value in options(FoveatedVLMProcessor).items() if name != "tokenizer"}


def test_every_network_option_is_explained():
    parameters = (ROOT / "docs/parameters.md").read_text().split("\n## model\n")[1].split("\n## ")[0]
    section = (ROOT / "docs/model.md").read_text().split("\n## Configuration\n")[1].split("\n## ")[0]
    written = set(re.findall(r"^\|`(\w+)`", parameters, re.MULTILINE)) | set(re.findall(r"`(\w+)`", section))
    assert set(options(FoveatedVLMConfig)) <= written
