"""What a supervised run leaves behind while it trains: metrics.jsonl, a progress bar, and which checkpoint is whole."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from safe_rlhf_v.training.runtime import read_lines

log = logging.getLogger(__name__)


class MetricsFile(TrainerCallback):
    """Appends every logged row to metrics.jsonl; after a resume, rows past the checkpoint are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = read_lines(self.path)
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step] if state.global_step else []
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class TimeLeft:
    """Time to the end of a run, by the mean of the steps since it began or went on at `step`."""

    def __init__(self, step: int) -> None:
        self.step, self.started = step, time.monotonic()

    def __call__(self, step: int, total: int) -> str:
        """`02:05 left`; nothing before a step was made, and at the last."""
        if not self.step < step < total:
            return ""
        a_step = (time.monotonic() - self.started) / (step - self.step)
        return f"{tqdm.format_interval(a_step * (total - step))} left"

    def line(self, step: int, total: int, figures: Mapping[str, str]) -> str:
        """`step 8 of 12: loss 0.31  02:05 left`."""
        parts = [f"{name} {value}" for name, value in figures.items()] + [self(step, total)]
        return f"step {step} of {total}: {'  '.join(filter(None, parts))}"


class ProgressBar(TrainerCallback):
    """A bar on a terminal, elsewhere a line every logging_steps with the time left; and where a run goes on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.left = TimeLeft(state.global_step)
        off = None if state.is_world_process_zero else True  # None: off unless a terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", disable=off)
        if state.global_step and state.is_world_process_zero:
            log.info(f"{self.name}: resumed at step {state.global_step} of {state.max_steps}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        shown: dict[str, str] = {k: f"{logs[k]:.3g}" for k in ("loss", "accuracy") if k in logs}
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable and state.is_world_process_zero:
            log.info(f"{self.name} {self.left.line(state.global_step, state.max_steps, shown)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
        self.bar = None


def is_complete(checkpoint: Path) -> bool:
    """Whether transformers wrote a checkpoint to its end."""
    state = checkpoint / "trainer_state.json"
    try:
        return state.is_file() and bool(json.loads(state.read_text(encoding="utf-8")))
    except json.JSONDecodeError:  # killed while writing it
        return False
