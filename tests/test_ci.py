"""What stops a command of .ci/run that stands still, and names the tests that had not ended."""

import os
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


def test_a_command_beside_another_is_recorded_when_it_has_ended(tmp_path):
    script = f"""set -euo pipefail
        {functions("launch", "record", "step", "facts", "failures", "unfinished")}
        measured() {{ "$@"; }}
        work={tmp_path} limit=60 summary=() failed=()
        first() {{ until [ -e $work/second ]; do sleep .1; done; echo FAILED tests/a.py::one; return 3; }}
        launch $work/first.log first &
        step touch $work/second
        wait
        record $work/first.log first
        printf '%s|' "${{summary[@]}}" "failed ${{failed[*]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    second, first, failure, failed = (text.strip() for text in done.stdout.splitlines()[-1].split("|")[:-1])
    assert second.endswith("s, exit code 0")
    assert first.startswith("first ")
    assert first.endswith("s, exit code 3")
    assert failure == "FAILED tests/a.py::one"
    assert failed == "failed first"


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
