"""Refuses to build a wheel: the package runs from its repository. All metadata is in pyproject.toml."""

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

REASON = """
foveated-vlm is not installed without its repository: the stages read conf/, params.yaml, dvc.yaml and workflow/
from it, and a wheel holds none of them. Clone the repository and run `make setup` in it, or `pip install --editable .`.
"""


class RefuseWheel(bdist_wheel):
    """`pip install .` and `pip wheel .` end here; an editable install does not run it."""

    def run(self):
        raise SystemExit(REASON)


setup(cmdclass={"bdist_wheel": RefuseWheel})
