import pytest


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(folder, page) of a report with everything that there can be on it. Read-only for the tests."""
    from tests.pipeline_steps.test_report import build, write_root  # only where a test needs it

    root = tmp_path_factory.mktemp("built")
    write_root(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return root, build(root, monkeypatch)


@pytest.fixture
def separate_projections(monkeypatch):
    """The vision layers call their modules. Joined projections compute keys and values of the query rows too, which
    nothing reads and formulas leave out, and copy the weights, which is no activation."""
    from model.foveated_encoder import LayerWeights

    monkeypatch.setattr(LayerWeights, "of_layers", classmethod(lambda cls, layers: None))
