"""What a kill, a full disk or a wrong clock leaves in the working folder: repaired, or one clear paragraph."""

import fcntl
import os
import shutil
import time
from types import SimpleNamespace

import pytest

from pipeline_steps.common import workspace
from pipeline_steps.common.errors import UserError
from pipeline_steps.common.params import ROOT


@pytest.fixture
def folder(tmp_path):
    """A working folder with the files that are checked."""
    for name in ("dvc.lock", "dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("content", ["", '{"read": {"a', "[1]", "[" * 5000])
def test_an_unreadable_rwlock_is_removed_with_a_note(folder, content):
    path = folder / ".dvc/tmp/rwlock"
    path.write_text(content)
    (note,) = workspace.check(folder)
    assert str(path) in note
    assert not path.exists()
    assert workspace.check(folder) == []


def test_a_valid_rwlock_stays(folder):
    path = folder / ".dvc/tmp/rwlock"
    path.write_text('{"read": {}, "write": {}}')
    assert workspace.check(folder) == []
    assert path.exists()


def test_an_rwlock_in_use_stays(folder):
    path = folder / ".dvc/tmp/rwlock"
    path.write_text("")
    with open(folder / ".dvc/tmp/rwlock.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="a DVC command that uses it is running"):
            workspace.check(folder)
    assert path.exists()


@pytest.mark.parametrize("share", [0, 0.3, 0.5])
def test_a_truncated_dvc_lock_is_explained(folder, share):
    path = folder / "dvc.lock"
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)].rsplit(":", 1)[0] + ": {" if share else "")
    with pytest.raises(UserError, match=r"dvc.lock: not a complete lock file .*`git checkout dvc.lock`"):
        workspace.check(folder)


def test_files_from_the_future_are_dated_now(folder):
    late = time.time() + 10**7
    os.utime(folder / "params.yaml", (late, late))
    (note,) = workspace.check(folder)
    assert "params.yaml" in note
    assert (folder / "params.yaml").stat().st_mtime <= time.time() + 1
    assert workspace.check(folder) == []


@pytest.mark.parametrize("name", ["a[1]", "b{x}", "c*"])
def test_a_path_with_pattern_characters_is_refused(folder, name):
    other = folder / name
    other.mkdir()
    with pytest.raises(UserError, match="which DVC and Snakemake read as a pattern"):
        workspace.check(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"f_bavail": 1}, "0 MiB of free disk space"), ({"f_favail": 0}, "without free inodes")],
)
def test_full_disks_are_explained(folder, monkeypatch, changes, message):
    real = os.statvfs(folder)
    names = ("f_bavail", "f_frsize", "f_files", "f_favail")
    disk = {name: getattr(real, name) for name in names} | {"f_bavail": 10**9, "f_files": 10**6, "f_favail": 10**5}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**disk | changes))
    with pytest.raises(UserError, match=message):
        workspace.check(folder)


def test_a_full_folder_for_temporary_files_is_explained(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=r"no temporary file can be written .No space left on device.*set TMPDIR"):
        workspace.check(folder)
