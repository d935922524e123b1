"""What the installed package promises: its command starts without the heavy libraries."""

import subprocess
import sys

from model.configuration_foveated_vlm import MODES
from pipeline_steps.inference import ask

HEAVY = ("torch", "transformers", "matplotlib", "pandas", "sklearn", "scipy")


def test_the_arguments_of_ask_are_read_without_the_heavy_libraries():
    code = f"import sys, pipeline_steps.inference.ask; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ask_offers_the_modes_of_the_model():
    assert ask.MODES == MODES
