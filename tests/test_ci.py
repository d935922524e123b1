""".ci/run: which commands it runs, what stops one that stands still, and which tests failed or had not ended."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).parents[1] / ".ci"


def watched(script, seconds="60 60"):
    command = [sys.executable, CI / "watched.py", sys.executable, "-u", "-c", script]
    return subprocess.run(
        command, env=os.environ | {"WATCHED_SECONDS": seconds}, capture_output=True, text=True, timeout=60
    )


def test_a_command_is_shown_with_its_exit_code():
    done = watched("import sys; print('out'); print('error', file=sys.stderr); sys.exit(3)")
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert sorted(lines[:2]) == ["error", "out"]
    assert lines[-1].startswith("largest process: ")
    assert watched("import os; os.kill(os.getpid(), 9)").returncode == 137


@pytest.mark.parametrize(
    ("script", "seconds", "code", "why"),
    [
        ("import time; print('begun'); time.sleep(60)", "60 5", 125, "stopped: nothing was printed for 5 s. "),
        (
            "import time\nwhile True: print('begun'); time.sleep(.1)",
            "5 60",
            124,
            "stopped: still running after 5 s. ",
        ),
    ],
)
def test_a_command_is_stopped_with_its_stacks_and_the_threads_that_were_awake(script, seconds, code, why):
    done = watched("import faulthandler; faulthandler.enable()\n" + script, seconds)
    assert done.returncode == code
    begun, stack, stopped = (done.stdout.index(text) for text in ("begun", 'File "<string>"', why))
    assert begun < stack < stopped
    assert "STAT CLS" in done.stdout[stopped:] or "ps: " in done.stdout[stopped:]


@pytest.mark.parametrize(
    "does", ["time.sleep(60)", "[(print('left', flush=True), time.sleep(.2)) for _ in range(300)]"]
)
def test_a_process_that_outlives_its_command_is_not_waited_for(does):
    script = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', \"import time; {does}\"]); print('last')"
    done = watched(script)
    assert done.returncode == 0
    assert "last" in done.stdout


def test_the_memory_of_a_stopped_command_is_its_own():
    done = watched("import time; kept = b'1' * 200 * 2**20; time.sleep(60)", "60 3")
    assert int(done.stdout.rsplit("largest process: ", 1)[1].split()[0]) > 200


def test_what_cannot_be_listed_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "ps: " in watched("import time; time.sleep(60)", "60 3").stdout


def functions(*names):
    """Shell code that defines these functions of .ci/run."""
    ranges = "; ".join(f"/^{name}()/,/^}}/p" for name in names)
    return f"source <(sed -n '{ranges}' {CI / 'run'})"


MAKEFILE = """
.PHONY: browser setup lint repro test test-all
browser lint:
\t@echo $@
setup:
\t@mkdir -p .venv/bin reports && ln -sf {python} .venv/bin/python
repro:
\t@sleep 2 && echo reproduced
test:
\t@sleep 1 && echo "==== 3 passed in 1 s ===="
test-all:
\t@ls .venv/bin/python && echo "FAILED tests/a.py::one - $$PYTEST_ADDOPTS" && exit 3
"""


def test_every_command_is_run_in_a_clone_and_what_failed_is_named(tmp_path):
    shutil.copytree(CI, tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(MAKEFILE.format(python=sys.executable))
    (tmp_path / ".gitignore").write_text(".venv\n")
    for words in (("init",), ("add", "--all"), ("commit", "--message", "all")):
        identity = ("-c", "user.name=Test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)
    variables = os.environ | {"TMPDIR": str(tmp_path), "PYTEST_ADDOPTS": ""}
    done = subprocess.run([".ci/run"], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "FAILED: make test-all"
    lines = done.stdout.rsplit("\n\n", 1)[1].splitlines()
    found = {line.split(" s, exit code ")[0].rsplit(" ", 1)[0].strip(): line for line in lines if "exit code" in line}
    assert {name: line.split("exit code ")[1][0] for name, line in found.items()} == {
        "make setup": "0",
        "make lint": "0",
        "make test": "0",
        "make test-all": "2",
        "make repro": "0",
    }
    assert "3 passed" in found["make test"]
    assert "FAILED tests/a.py::one - -v --durations=25  -m 'slow or browser'" in lines
    assert not list(tmp_path.glob("foveated-vlm-ci.*"))


def test_tests_that_failed_are_named(tmp_path):
    lines = ["FAILED tests/a.py::test_one - assert 1 == 2", "ERROR tests/b.py::test_two - OSError"]
    (tmp_path / "log").write_text("\n".join(["[gw0] [ 1%] FAILED tests/a.py::test_one ", *lines, "FAILED: nothing"]))
    log = tmp_path / "log"
    command = f"set -euo pipefail; {functions('failures')}; failures {log}; echo end; : > {log}; failures {log}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [*lines, "end"]


def test_tests_that_had_not_ended_are_named(tmp_path):
    (tmp_path / "log").write_text(
        "tests/a.py::test_one[a b] \n"
        "tests/b.py::test_two \n"
        "[gw0] [  1%] PASSED tests/a.py::test_one[a b] \n"
        "tests/a.py::test_three \n"
        "[gw1] [  2%] FAILED tests/b.py::test_two \n"
        "  File tests/b.py, line 3\n"
        "largest process: 12 MiB\n"
    )
    command = f"{functions('facts', 'unfinished')}; facts {tmp_path / 'log'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "largest process: 12 MiB not ended: tests/a.py::test_three"
