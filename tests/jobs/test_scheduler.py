"""The scheduler with commands that only touch files."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from safe_rlhf_v.jobs.live import LiveWatcher, clock
from safe_rlhf_v.jobs.scheduler import Job, Outcome, Running, run_jobs


class Recorder:
    """Keeps what a watcher is told."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.most = 0

    def started(self, job: Job) -> None:
        self.events.append(f"+{job.name}")

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.events.append(f"-{job.name}")

    def tick(self, running: Sequence[Running], waiting: Sequence[Job]) -> None:
        self.most = max(self.most, len(running))


def job(folder: Path, name: str, script: str, after: Sequence[str] = ()) -> Job:
    """A job whose work is the file NAME; $0 in the script is its path."""
    path = folder / name
    return Job(
        name=name, command=["sh", "-c", script, str(path)], log=folder / f"{name}.log", done=path.is_file, after=after
    )


def go(jobs: Sequence[Job], workers: int = 2, watcher: Recorder | None = None) -> dict[str, Outcome]:
    return run_jobs(jobs, workers, watcher or Recorder(), poll=0.01)


def test_jobs_stand_beside_each_other_up_to_the_number_of_workers(tmp_path: Path) -> None:
    """Each of two waits for the other's file: one after the other they would never end."""
    meet = "touch $0.here; while [ ! -e {other}.here ]; do sleep 0.01; done; touch $0"
    pair = [
        job(tmp_path, "a", meet.format(other=tmp_path / "b")),
        job(tmp_path, "b", meet.format(other=tmp_path / "a")),
    ]
    watcher = Recorder()
    more = [job(tmp_path, name, "touch $0") for name in "cdef"]
    outcomes = go([*pair, *more], workers=2, watcher=watcher)
    assert {o.state for o in outcomes.values()} == {"done"}
    assert watcher.most == 2


def test_a_job_waits_for_what_it_needs(tmp_path: Path) -> None:
    needs_a = job(tmp_path, "b", f"test -e {tmp_path}/a && touch $0", after=["a"])
    watcher = Recorder()
    assert go([needs_a, job(tmp_path, "a", "sleep 0.1; touch $0")], watcher=watcher)["b"].state == "done"
    assert watcher.events == ["+a", "-a", "+b", "-b"]


def test_a_failure_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    broken = job(tmp_path, "broken", "for i in $(seq 30); do echo line $i; done; echo 'what went wrong' >&2; exit 3")
    jobs = [
        broken,
        job(tmp_path, "next", "touch $0", ["broken"]),
        job(tmp_path, "last", "touch $0", ["next"]),
        job(tmp_path, "other", "touch $0"),
        job(tmp_path, "liar", "exit 0"),
        job(tmp_path, "killed", "kill -9 $$"),
    ]
    found = go(jobs)
    assert {name: o.state for name, o in found.items()} == {
        "broken": "failed", "next": "not run", "last": "not run", "other": "done", "liar": "failed", "killed": "failed",
    }  # fmt: skip
    assert found["broken"].tail[0] == "exit code 3"
    assert found["broken"].tail[-1] == "what went wrong"
    assert found["broken"].tail[1] == "line 17"  # the last fifteen lines: 17 to 30, and the last
    assert found["next"].tail == ("needs broken",)
    assert found["liar"].tail == ("ended without its result",)
    assert found["killed"].tail[0] == "killed by signal 9"


def test_done_jobs_are_skipped_and_failed_ones_tried_again(tmp_path: Path) -> None:
    count = "echo x >> $0.runs; test -e $0.fixed && touch $0"
    jobs = [job(tmp_path, "a", "echo x >> $0.runs; touch $0"), job(tmp_path, "b", count)]
    assert [o.state for o in go(jobs).values()] == ["done", "failed"]
    (tmp_path / "b.fixed").touch()
    again = go(jobs)
    assert {name: o.state for name, o in again.items()} == {"a": "done before", "b": "done"}
    assert (tmp_path / "a.runs").read_text().count("x") == 1
    assert (tmp_path / "b.runs").read_text().count("x") == 2


def test_work_that_is_there_counts_whatever_the_exit_code(tmp_path: Path) -> None:
    assert go([job(tmp_path, "a", "touch $0; exit 2")])["a"].state == "done"


def another_scheduler(folder: Path, command: str) -> subprocess.Popen[bytes]:
    """A process that schedules job "a" with this command in the folder."""
    script = (
        "import sys; sys.path[:0] = sys.argv[3:]; from pathlib import Path; from test_scheduler import go, job;"
        "go([job(Path(sys.argv[1]), 'a', sys.argv[2])])"
    )
    here = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    return subprocess.Popen([sys.executable, "-c", script, str(folder), command, *here])


def test_another_schedulers_job_is_waited_for_not_run_twice(tmp_path: Path) -> None:
    """The same job in two schedulers at once runs once."""
    jobs = [job(tmp_path, "a", "echo x >> $0.runs; sleep 0.3; touch $0")]
    other = another_scheduler(tmp_path, "echo x >> $0.runs; sleep 0.3; touch $0")
    wait_for((tmp_path / "a.runs").is_file)
    assert go(jobs)["a"].state == "done before"
    assert other.wait() == 0
    assert (tmp_path / "a.runs").read_text().count("x") == 1


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_scheduler_stops_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    def stop() -> None:
        wait_for((tmp_path / "a.pid").is_file)
        wait_for(lambda: (tmp_path / "a.pid").read_text().strip().isdigit())
        time.sleep(0.3)  # the job may be quicker than the scheduler is to note it
        os.kill(os.getpid(), number)

    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    threading.Thread(target=stop).start()
    with pytest.raises(KeyboardInterrupt):
        go([job(tmp_path, "a", "echo $$ > $0.pid; exec sleep 60")])
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)
    wait_for(lambda: not lives(int((tmp_path / "a.pid").read_text())))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the processes of a killed scheduler run to their end")
def test_a_killed_scheduler_takes_its_processes_with_it(tmp_path: Path) -> None:
    other = another_scheduler(tmp_path, "echo $$ > $0.pid; exec sleep 60")
    wait_for((tmp_path / "a.pid").is_file)
    wait_for(lambda: (tmp_path / "a.pid").read_text().strip().isdigit())
    other.kill()
    other.wait()
    wait_for(lambda: not lives(int((tmp_path / "a.pid").read_text())))


def lives(pid: int) -> bool:
    """Not dead, and not dead but for the parent who has to be told."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()


# ---------------------------------------------------------------------------------------------------- the live lines


class Fake:
    """A running job of a given age."""

    def __init__(self, kind: str, seconds: float, share: float | None) -> None:
        self.seconds = seconds
        self.job = Job(name=kind, kind=kind, command=[], log=Path("x"), done=lambda: False, progress=lambda: share)


def test_the_end_is_estimated_from_progress_and_from_jobs_of_the_kind() -> None:
    """Half done after 30 s: 30 s to go. Of a kind that took 40 and 60 s, 10 s in: 40 s. Waiting: one of each, 60 + 50.

    Two processes: (30 + 40 + 60 + 50) / 2 = 90 s.
    """
    watcher = LiveWatcher(Console(), 4, {"measure": [40.0, 60.0]})
    running: list = [Fake("train m", 30.0, 0.5), Fake("measure", 10.0, None)]
    assert [watcher.left(item) for item in running] == pytest.approx([30, 40])
    waiting = [Fake("train m", 0, None).job, Fake("measure", 0, None).job]
    assert watcher.estimate(running, waiting) == pytest.approx(90)
    assert watcher.estimate(running, [Fake("train other", 0, None).job]) == pytest.approx((30 + 40 + 60) / 2)
    assert LiveWatcher(Console(), 4).estimate([], waiting) is None


def test_lines_stay_where_there_is_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        console = Console(file=file, width=200)
        with LiveWatcher(console, 2) as watcher:
            run_jobs([job(tmp_path, "a", "touch $0"), job(tmp_path, "b", "echo [bad]; exit 1")], 1, watcher, poll=0.01)
    text = (tmp_path / "out").read_text()
    assert "begins  a" in text and "done  a" in text
    assert "failed  b" in text and "exit code 1" in text and "    [bad]" in text


def test_clock() -> None:
    assert [clock(s) for s in (7, 71.2, 3671)] == ["0:07", "1:11", "1:01:11"]
