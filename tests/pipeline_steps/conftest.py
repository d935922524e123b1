import subprocess
import sys

import pytest

TOY = '''"""A toy: a head that tells the time of a frame from its visual token."""

from pydantic import NonNegativeFloat

from pipeline_steps.common.params import StrictModel
from pipeline_steps.training.objectives.base import Objective, Term


class FrameTime(Objective):
    """Regression of a frame's time."""

    name = "frame_time"
    term_names = ("loss_frame_time",)

    class Parameters(StrictModel):
        weight: NonNegativeFloat
        """Weight of the squared error in s^2."""

    def make_module(self):
        from torch import nn

        return nn.Linear(self.config.text_config.hidden_size, 1)

    def terms(self, outputs, batch):
        if outputs.visual_tokens is None:
            return {}
        errors = self.module(outputs.visual_tokens).mean((1, 2)) - batch.frame_times
        return {"loss_frame_time": Term(errors.square().mean(), self.parameters.weight, "frames")}
'''


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(folder, page) of a report with everything that there can be on it. Read-only for the tests."""
    from tests.pipeline_steps.reported import build, write_root  # only where a test needs it

    root = tmp_path_factory.mktemp("built")
    write_root(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return root, build(root, monkeypatch)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder of ten cut-outs (tests/drawings.py). Read-only for the tests."""
    from tests import drawings

    place = tmp_path_factory.mktemp("cutouts")
    drawings.write(place)
    return place


@pytest.fixture(scope="session")
def cutouts(drawn):
    """What the world of objects makes of them, a fifth of their names held out."""
    from pipeline_steps.world.cutouts import Cutouts

    return Cutouts(drawn, 0.2, seed=1)


@pytest.fixture
def separate_projections(monkeypatch):
    """The vision layers call their modules. Joined projections compute keys and values of the query rows too, which
    nothing reads and formulas leave out, and copy the weights, which is no activation."""
    from model.foveated_encoder import LayerWeights

    monkeypatch.setattr(LayerWeights, "of_layers", classmethod(lambda cls, layers: None))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An objective of one file, which lies in the package; its parameter is 0.5."""
    from pipeline_steps.training import objectives

    (tmp_path / "package").mkdir()
    (tmp_path / "package/frame_time.py").write_text(TOY)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path / "package")])
    yield {"frame_time": {"weight": 0.5}}
    sys.modules.pop("pipeline_steps.training.objectives.frame_time")


@pytest.fixture
def study_files(tmp_path, monkeypatch):
    """A folder for conf/study."""
    from pipeline_steps.study import design

    monkeypatch.setattr(design, "STUDIES", tmp_path)
    monkeypatch.setattr(design, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def clean_tree(monkeypatch):
    """A study is planned as if every change was committed."""
    from pipeline_steps.study import plan

    monkeypatch.setattr(plan, "clean_commit", lambda: "c0ffee")


@pytest.fixture
def git_repository(tmp_path, monkeypatch):
    """A repository with one commit, of which studies are planned."""
    from pipeline_steps.study import plan

    monkeypatch.setattr(plan, "ROOT", tmp_path)
    for words in (["init", "-q"], ["config", "user.email", "a@b.c"], ["config", "user.name", "n"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "code.py").write_text("1")
    subprocess.run("git add -A && git commit -qm one", cwd=tmp_path, shell=True, check=True)
    return tmp_path


@pytest.fixture
def pooled(monkeypatch):
    """Next-frame targets are of a stand-in for the autoencoder."""
    from pipeline_steps.common import next_frame
    from tests.pipeline_steps.predicted import CHANNELS, Pooled

    monkeypatch.setattr(next_frame, "FrameLatents", Pooled)
    monkeypatch.setattr(next_frame, "latent_channels", lambda folder, key: CHANNELS)
