"""Work in forks and in ranks. Each test is a process of its own: a fork of pytest would share what pytest runs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest

from safe_rlhf_v.jobs.forked import first_failure

ROOT = Path(__file__).parents[2]
START = """
import functools, os, signal, sys, time
from pathlib import Path
from safe_rlhf_v.jobs.forked import Forked, ranks
from safe_rlhf_v.jobs.scheduler import Job, run_jobs
folder = Path(sys.argv[1])
class Silent:
    def started(self, job): pass
    def ended(self, job, outcome): pass
    def tick(self, running, waiting): pass
def job(name, work, **more):
    return Job(name=name, command=work, log=folder / f"{name}.log", done=(folder / name).is_file, **more)
def stands(name):
    return (folder / name).is_file()
def wait(name):
    end = time.monotonic() + 30
    while not stands(name):
        assert time.monotonic() < end
        time.sleep(0.01)
"""


def start(folder: Path, script: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", START + script, str(folder)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(folder: Path, script: str) -> str:
    process = start(folder, script)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0, printed
    return printed


def test_a_function_runs_in_a_fork_with_its_own_log_and_environment(tmp_path: Path) -> None:
    printed = run(
        tmp_path,
        """
def work():
    print("printed in the child", os.environ["GIVEN"], flush=True)
    (folder / "a").touch()
def broken():
    print("what went wrong", flush=True)
    sys.exit(3)
outcomes = run_jobs([job("a", work), job("b", broken)], 2, Silent(), {"GIVEN": "7"}, poll=0.01)
print(outcomes["a"].state, outcomes["b"].state, outcomes["b"].tail, "GIVEN" in os.environ)
""",
    )
    assert printed == "done failed ('exit code 3', 'what went wrong') False\n"
    assert (tmp_path / "a.log").read_text() == "printed in the child 7\n"


def test_jobs_share_the_cores_that_there_are(tmp_path: Path) -> None:
    """Three cores: a job of two and one of one stand beside each other; another of two waits, and so does one of four,
    which runs alone in the end."""
    printed = run(
        tmp_path,
        """
def work(name):
    with (folder / "order").open("a") as order:
        order.write(f"+{name} ")
        order.flush()
        time.sleep(0.3)
        order.write(f"-{name} ")
    (folder / name).touch()
sizes = {"a": 2, "b": 1, "c": 2, "d": 4}
jobs = [job(name, functools.partial(work, name), cores=cores) for name, cores in sizes.items()]
outcomes = run_jobs(jobs, 3, Silent(), poll=0.01)
print({o.state for o in outcomes.values()}, (folder / "order").read_text())
""",
    )
    order = printed.split("} ")[1].split()
    assert set(order[:2]) == {"+a", "+b"} and printed.startswith("{'done'}")
    assert order.index("+c") > order.index("-a")
    assert order[-2:] == ["+d", "-d"] or order.index("-d") == order.index("+d") + 1


def test_ranks_are_one_launch(tmp_path: Path) -> None:
    """Each knows its place, and each waits for the other's file: one after the other they would never end."""
    run(
        tmp_path,
        """
def work():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU")
    (folder / os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
    wait("1" if os.environ["RANK"] == "0" else "0")
ranks(2, work)
""",
    )
    assert (tmp_path / "0").read_text() == "0 0 2 127.0.0.1 true"
    assert (tmp_path / "1").read_text() == "1 1 2 127.0.0.1 true"


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    before = time.monotonic()
    printed = run(
        tmp_path,
        """
def work():
    sys.exit(5) if os.environ["RANK"] == "1" else time.sleep(60)
try:
    ranks(2, work)
except ChildProcessError as error:
    print(error)
""",
    )
    assert printed == "one of 2 ranks ended with exit code 5\n"
    assert time.monotonic() - before < 30


class Slow:
    """A process that is seen to end before its exit code is there: the first `looks` looks at it find none."""

    def __init__(self, code: int, looks: int, runs: bool) -> None:
        self.sentinel, self._end = os.pipe()
        self._code, self._looks, self._runs = code, looks, runs
        if runs:  # to its own end, were it not for terminate()
            Timer(2, self._stop, [0]).start()
        else:
            os.close(self._end)

    def _stop(self, code: int) -> None:
        if self._runs:
            self._runs, self._code = False, code
            os.close(self._end)

    def terminate(self) -> None:
        self._stop(-15)

    @property
    def exitcode(self) -> int | None:
        self._looks -= 1
        return None if self._runs or self._looks >= 0 else self._code


@pytest.mark.parametrize("looks", range(5))
def test_a_failure_is_seen_whenever_its_exit_code_is_there(looks: int) -> None:
    failed, other = Slow(5, looks, runs=False), Slow(0, 0, runs=True)
    assert first_failure([other, failed]) == 5  # type: ignore[list-item]
    assert other.exitcode == -15  # ended, not waited for
    assert first_failure([Slow(7, looks, runs=False)]) == 7  # type: ignore[list-item]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the processes of a killed parent run to their end")
@pytest.mark.parametrize("kill", ["scheduler", "job"])
def test_forks_and_their_ranks_end_with_their_parent(tmp_path: Path, kill: str) -> None:
    process = start(
        tmp_path,
        """
def work():
    (folder / f"pid{os.environ['RANK']}.tmp").write_text(str(os.getpid()))
    os.replace(folder / f"pid{os.environ['RANK']}.tmp", folder / f"pid{os.environ['RANK']}")
    time.sleep(60)
def both():
    (folder / "job.tmp").write_text(str(os.getpid()))
    os.replace(folder / "job.tmp", folder / "job")
    ranks(2, work)
run_jobs([job("a", both, cores=2)], 2, Silent(), poll=0.01)
""",
    )
    pids = [tmp_path / name for name in ("pid0", "pid1", "job")]
    wait_for(lambda: all(file.is_file() for file in pids))
    numbers = [int(file.read_text()) for file in pids]
    os.kill(process.pid if kill == "scheduler" else numbers[2], 9)
    wait_for(lambda: not any(lives(number) for number in numbers))
    process.wait(timeout=30)


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def lives(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()
