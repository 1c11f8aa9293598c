"""What the scheduler's jobs do, on the console: one live line a process, and an estimate of the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from safe_rlhf_v.jobs.scheduler import Job, Outcome, Running

EVERY = 60.0
"""Seconds between two lines where the console is no terminal."""


class LiveWatcher:
    """A line as each job begins and ends, which stays; below them a live table. Without a terminal: a line a minute.

    known: seconds that jobs of a kind took before, so that a resumed run estimates its end from the start.
    """

    def __init__(self, console: Console, total: int, known: dict[str, list[float]] | None = None) -> None:
        self.console, self.total, self.ended_count = console, total, 0
        self.seconds: dict[str, list[float]] = {kind: list(found) for kind, found in (known or {}).items()}
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.spoke = time.monotonic()

    def __enter__(self) -> LiveWatcher:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def started(self, job: Job) -> None:
        if self.live is None:
            self.console.print(f"begins  {job.name}", markup=False, highlight=False)

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.ended_count += 1
        if outcome.state == "done":
            self.seconds.setdefault(job.kind, []).append(outcome.seconds)
        style = {"failed": "red", "not run": "yellow", "done before": "dim"}.get(outcome.state, "green")
        took = f" in {clock(outcome.seconds)}" if outcome.seconds else ""
        why = f": {outcome.tail[0]}" if outcome.tail else ""
        said = Text.assemble((outcome.state, style), f"  {job.name}{took}{why}")
        self.console.print(said, highlight=False, soft_wrap=True)
        for line in outcome.tail[1:]:
            self.console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)

    def tick(self, running: Sequence[Running], waiting: Sequence[Job]) -> None:
        if self.live is not None:
            self.live.update(self._table(running, waiting), refresh=True)
        elif running and time.monotonic() - self.spoke >= EVERY:
            self.spoke = time.monotonic()
            jobs = ", ".join(f"{item.job.name} {self._share(item)}".strip() for item in running)
            self.console.print(f"{self._state(running, waiting)}: {jobs}", markup=False, highlight=False)

    def _table(self, running: Sequence[Running], waiting: Sequence[Job]) -> Table:
        table = Table.grid(padding=(0, 2))
        for item in running:
            left = self.left(item)
            end = f"about {clock(left)} left" if left is not None else ""
            table.add_row(escape(item.job.name), _bar(item.job.progress()), clock(item.seconds), end)
        table.add_row(f"[bold]{self._state(running, waiting)}[/]")
        return table

    def _state(self, running: Sequence[Running], waiting: Sequence[Job]) -> str:
        left = self.estimate(running, waiting)
        end = f", about {clock(left)} left" if left is not None else ""
        return f"{self.ended_count} of {self.total} jobs done{end}"

    def _share(self, item: Running) -> str:
        share = item.job.progress()
        return "" if share is None else f"{share:.0%}"

    def left(self, item: Running) -> float | None:
        """Seconds a running job still takes: by its own progress once that says something, else by its kind."""
        share = item.job.progress()
        if share and share >= 0.1:
            return item.seconds * (1 - share) / share
        length = self._length(item.job.kind, {})
        return None if length is None else max(0.0, length - item.seconds)

    def _length(self, kind: str, running: dict[str, float]) -> float | None:
        """Seconds a job of this kind takes: of its own kind, else of the kinds with the same first word."""
        known = running | {name: median(found) for name, found in self.seconds.items()}
        if kind in known:
            return known[kind]
        like = [seconds for name, seconds in known.items() if name.split()[0] == kind.split()[0]]
        return median(like) if like else None

    def estimate(self, running: Sequence[Running], waiting: Sequence[Job]) -> float | None:
        """Seconds to the end, if as many processes go on; None while the length of some kind of job is not known."""
        seen = {item.job.kind: item.seconds + left for item in running if (left := self.left(item)) is not None}
        rest = [self.left(item) for item in running] + [self._length(job.kind, seen) for job in waiting]
        known = [seconds for seconds in rest if seconds is not None]
        return sum(known) / max(1, len(running)) if len(known) == len(rest) else None


def _bar(share: float | None, width: int = 24) -> str:
    if share is None:
        return "[dim]" + "·" * width + "[/]"
    full = round(width * min(1.0, share))
    return f"[green]{'━' * full}[/][dim]{'━' * (width - full)}[/] {share:4.0%}"


def clock(seconds: float) -> str:
    """71.2 -> '1:11', 3671 -> '1:01:11'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
