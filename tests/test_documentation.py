"""The commands in docs/ leave the checkout clean, as studies refuse one that is not."""

import re
import subprocess

from pipeline_steps.common.params import ROOT

OUTPUT = re.compile(r"^ {4}.* (?:--out|-o|--output|--local-dir) ([a-z]\w*)", re.MULTILINE)


def test_what_the_documented_commands_write_into_the_checkout_is_ignored():
    written = {name for page in ROOT.glob("docs/*.md") for name in OUTPUT.findall(page.read_text())}
    assert {"mine", "plots"} <= written
    paths = [*(f"{name}/file" for name in written), "clip.heatmap.gif", "world_objects.jpg"]  # defaults
    done = subprocess.run(["git", "check-ignore", *paths], cwd=ROOT, capture_output=True, text=True)
    assert set(paths) - set(done.stdout.split()) == set()
