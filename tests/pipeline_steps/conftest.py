import pytest


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(folder, page) of a report with everything that there can be on it. Read-only for the tests."""
    from tests.pipeline_steps.test_report import build, write_root  # only where a test needs it

    root = tmp_path_factory.mktemp("built")
    write_root(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return root, build(root, monkeypatch)
