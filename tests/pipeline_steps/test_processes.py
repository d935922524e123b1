"""Work in other processes: order, what a killed process says, and that nothing outlives the process that started it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline_steps.common.errors import UserError
from pipeline_steps.common.processes import ends_with_this_process, map_in_processes
from tests.pipeline import ROOT

_started = []


def _start():
    _started.append(os.getpid())


def _work(job):
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "fail":
        raise UserError("cannot be done")
    return job, _started == [os.getpid()], multiprocessing.parent_process() is not None


@pytest.mark.parametrize("num_processes", [2, 3])
def test_results_come_in_order_from_processes_that_start_once(num_processes):
    results = list(map_in_processes(_work, range(7), num_processes, "", _start, chunksize=2))
    assert results == [(job, True, True) for job in range(7)]


@pytest.mark.parametrize(("num_processes", "jobs"), [(1, ["a", "b"]), (4, ["a"])])
def test_one_process_or_one_job_needs_no_other_process(num_processes, jobs):
    _started.clear()
    assert list(map_in_processes(_work, jobs, num_processes, "", _start)) == [(job, True, False) for job in jobs]


def test_a_killed_process_is_an_error_with_advice():
    with pytest.raises(UserError, match=r"^one of 2 processes was killed, probably for lack of memory .* Use one\.$"):
        list(map_in_processes(_work, ["die", *range(9)], 2, "Use one."))


def _cannot_start():
    raise UserError("no tokenizer")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_errors_of_the_start_arrive_unchanged(num_processes):
    with pytest.raises(UserError, match=r"^no tokenizer$"):
        list(map_in_processes(_work, ["a", "b"], num_processes, "", _cannot_start))


def test_a_number_of_processes_below_one_is_refused():
    with pytest.raises(UserError, match=r"^the number of processes is 0, expected at least 1$"):
        list(map_in_processes(_work, ["a", "b"], 0, ""))


def _slow(job):
    if job == 0:
        raise UserError("cannot be done")
    time.sleep(60)


def test_a_failed_job_ends_the_others_at_once():
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^cannot be done$"):
        list(map_in_processes(_slow, range(8), 2, ""))
    assert time.monotonic() - started < 40


def test_errors_of_the_work_arrive_unchanged():
    with pytest.raises(UserError, match=r"^cannot be done$"):
        list(map_in_processes(_work, ["a", "fail", "b"], 2, ""))


PARENT = """
import subprocess, sys, time
from pipeline_steps.common.processes import ends_with_this_process
child = subprocess.Popen(ends_with_this_process([sys.executable, "-c", "import time; time.sleep(60)"]))
print(child.pid, flush=True)
time.sleep(60)
"""


def test_the_command_keeps_its_arguments_and_its_exit_code():
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "a b", "-c", ROOT]
    done = subprocess.run(ends_with_this_process(command), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, f"['a b', '-c', '{ROOT}']\n")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent death signal")
def test_a_command_ends_with_a_killed_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}/cwd"):  # a zombie has none
        assert time.monotonic() < end, f"still there: {child}"
        time.sleep(0.05)


HUNG = """
import os, time

def test_a():
    if os.fork() == 0:
        time.sleep(100)
    os._exit(1)

def test_b():
    pass
"""


@pytest.mark.slow
def test_a_crashed_test_process_is_noticed_while_its_forked_children_live(tmp_path):
    (tmp_path / "test_hung.py").write_text(HUNG)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", "1", "--max-worker-restart=0", tmp_path]
    with open(tmp_path / "log", "w+") as log:  # not a pipe: the children keep it open
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
        options = {"stdout": log, "stderr": log, "cwd": tmp_path, "env": environment, "timeout": 90}
        done = subprocess.run(command, **options, check=False)
        log.seek(0)
        assert "crashed while running 'test_hung.py::test_a'" in log.read()
    assert done.returncode == 1
