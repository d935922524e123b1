"""What a kill, a full disk or a wrong clock leaves in the working folder: repaired, or one clear paragraph."""

import fcntl
import os
import shutil
import subprocess
import sys
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


@pytest.mark.parametrize("text", ["[" * 200_000, "{a: " * 100_000, "- " * 100_000])
def test_a_deeply_nested_dvc_lock_is_refused(folder, text):
    (folder / "dvc.lock").write_text(text)
    with pytest.raises(
        UserError, match=r"dvc.lock: not a complete lock file \(more than 50 levels of nesting in line 1"
    ):
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


# ---------------------------------------------------------------- DVC itself, and real disks


@pytest.fixture(scope="module")
def dvc_folder(tmp_path_factory):
    """A DVC repository with one stage that has run."""
    folder = tmp_path_factory.mktemp("dvc")
    (folder / "dvc.yaml").write_text("stages:\n  a:\n    cmd: echo 1 > a\n    outs: [a]\n")
    for words in (["init", "--no-scm", "-q"], ["config", "core.analytics", "false"], ["repro", "-q"]):
        subprocess.run([sys.executable, "-m", "dvc", *words], cwd=folder, check=True)
    return folder


def repro(folder):
    (folder / "a").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "content", "quoted"),
    [
        (".dvc/tmp/rwlock", "", "Unable to read RWLock-file"),
        (".dvc/tmp/rwlock", '{"read": {"a', "Unable to read RWLock-file"),
        (".dvc/tmp/rwlock", "[1]", "format error"),
        ("dvc.lock", 'schema: "2.0"\nstages:\n  a: {', "is invalid"),
        ("dvc.lock", "", "validation failed"),
    ],
)
def test_what_dvc_says_is_in_the_documentation_and_the_command_there_helps(dvc_folder, name, content, quoted):
    path = dvc_folder / name
    intact = path.read_text()
    path.write_text(content)
    try:
        code, said = repro(dvc_folder)
        assert code != 0
        assert quoted in said
        assert quoted in (ROOT / "docs/training.md").read_text()
        if name == "dvc.lock":
            with pytest.raises(UserError, match=r"Restore it with `git checkout dvc[.]lock`, or delete it"):
                workspace.check(dvc_folder)
            path.unlink()
        else:
            (note,) = workspace.check(dvc_folder)
            assert "Removed" in note
        assert repro(dvc_folder)[0] == 0
    finally:
        path.write_text(intact)


def on_small_disk(place, options, command):
    """Runs a shell command where `place` is a disk with these mount options, in a mount namespace of its own."""
    script = f"mount -t tmpfs -o {options} tmpfs {place} || exit 99; cd {place}; {command}"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=100)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    return done


CHECK = f"""PYTHONPATH={ROOT} {sys.executable} -c '
from pathlib import Path
from pipeline_steps.common import errors, workspace
errors.run_main(lambda: print(workspace.check(Path("WHERE"))))'"""
PARAMETERS = f"cd {ROOT} && {sys.executable} -m pipeline_steps.parameters --out $OLDPWD/out/parameters.json"
FILL = "dd if=/dev/zero of=full bs=1k 2>/dev/null;"
NO_INODES = "i=0; while touch file$i 2>/dev/null; do i=$((i+1)); done;"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (util-linux)")
@pytest.mark.parametrize(
    ("options", "command", "message"),
    [
        ("size=1m", FILL + CHECK.replace("WHERE", "."), "the working folder has 0 MiB of free disk space"),
        ("nr_inodes=5", NO_INODES + CHECK.replace("WHERE", "."), "without free inodes (5 files)"),
        ("size=1m", "mkdir out;" + FILL + PARAMETERS, "cannot be written (No space left on device)"),
        ("nr_inodes=5", NO_INODES + PARAMETERS, "cannot be written (No space left on device)"),
    ],
    ids=["disk", "inodes", "disk of a stage", "inodes of a stage"],
)
def test_full_disks_of_the_kernel_are_explained(tmp_path, options, command, message):
    done = on_small_disk(tmp_path, options, command)
    assert done.returncode == 1, done
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare (util-linux)")
@pytest.mark.parametrize(("options", "fill"), [("size=1m", FILL), ("nr_inodes=5", NO_INODES)], ids=["disk", "inodes"])
def test_a_full_folder_for_temporary_files_is_replaced_with_a_note(tmp_path, options, fill):
    done = on_small_disk(tmp_path, options, fill + "export TMPDIR=$PWD;" + CHECK.replace("WHERE", "/"))
    assert done.returncode == 0, done
    assert f"{tmp_path} (TMPDIR): full, missing or not writable. Temporary files go to /tmp." in done.stdout
