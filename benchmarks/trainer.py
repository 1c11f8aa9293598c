"""Samples per second and peak memory of a constrained update, against TRL's GRPO and against separate models.

    python benchmarks/trainer.py --size tiny

Contenders, each in a process of its own, take turns: one update each, round after round. Same model, prompts, samples,
lengths, adapters and bound on the rows of a pass; one optimizer step a rollout. All but the tiny ones are too big to
stand side by side: their processes start anew for every turn, and make an update that is not counted first.

    ours, functions        group_lag; reward and cost are two functions of the text: the same work as TRL's
    TRL GRPO, functions    GRPOTrainer with two reward functions, the same adapters, and a KL to the reference
    ours, models           group_lag with a reward and a cost model as adapters
    ours, models, critics  ppo_lag with a reward model, a cost model and two critics as adapters
    separate, models, critics   ppo_lag on six full models, pictures and (but in generation) prompts read afresh by each
                                pass and for each sample, all weights trained but the towers': the shape of the released
                                trainer (not for 7B: six models do not fit)

With --gradient-checkpointing TRL recomputes and differentiates the frozen tower as well, which ours never does.
TRL has no reward model for pictures, no cost model and no critics, so the first two rows compare like with like.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import (
    LORA,
    SHAPES,
    Clock,
    Work,
    adapter_roles,
    build,
    default_work,
    headed,
    machine,
    make_prompts,
    parser,
    peak_bytes,
    setting,
    show,
    trainer,
    write,
)
from tqdm import trange

from safe_rlhf_v.roles.protocol import SeparateRoles
from safe_rlhf_v.roles.scorers import TextScorer
from safe_rlhf_v.types import Inputs
from safe_rlhf_v.vlm.adapters import lora_config
from safe_rlhf_v.vlm.processing import Encoder

Step = Callable[[], float]  # one update; returns its seconds


def helpful(text: str) -> float:
    return len(set(text.split())) / 10


def harmful(text: str) -> float:
    return text.count("take") - 0.5


class Afresh(SeparateRoles):
    """Encodes pictures at every pass of every model and, but in generation, reads a prompt with each of its samples."""

    def prepare(self, inputs: Inputs) -> Inputs:
        return inputs

    def reads_once(self, inputs: Inputs) -> bool:
        return False

    def _ask(self, role: str, question: Callable[..., Any], inputs: Inputs, *args: Any) -> Any:
        apart = replace(inputs, image_keys=tuple(map(str, range(len(inputs)))))
        return super()._ask(role, question, apart, *args)


def ours(roles: Any, work: Work, device: torch.device, folder: Path, critics: bool, functions: bool) -> Step:
    scorer = TextScorer(lambda prompt, text: (helpful(text), harmful(text)), roles.encoder.decode)
    options = {"scorer": scorer if functions else None, "per_device_micro_batch_size": work.micro_batch or None}
    online = trainer(roles, work, folder, critics=critics, **options)
    return lambda: Clock(device).time(online.advance, repeats=1, warm=False)


def separate(work: Work, device: torch.device, dtype: torch.dtype) -> SeparateRoles:
    policy, processor = build(work, device, dtype)
    policy.requires_grad_(True)
    scorers = {n: headed(work, device, dtype, n) for n in ("reward", "cost", "reward_critic", "cost_critic")}
    for name in ("reward_critic", "cost_critic"):
        scorers[name].requires_grad_(True)
        scorers[name].heads = torch.nn.ModuleDict({name.removesuffix("_critic"): scorers[name].heads[name]})
    reference, encoder = build(work, device, dtype)[0], Encoder(processor, config=policy.config)
    return Afresh(policy, reference, scorers, encoder, gradient_checkpointing=work.gradient_checkpointing)


def trl_grpo(work: Work, device: torch.device, dtype: torch.dtype, folder: Path) -> Step:
    """TRL's trainer reads its own data set and makes its own loop, so a callback takes the times of its steps."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, processor = build(work, device, dtype)
    times: list[float] = []

    class Times(TrainerCallback):
        clock, start = Clock(device), 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = self.clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(self.clock() - self.start)

    def said(completions: list[Any]) -> list[str]:
        return [completion[0]["content"] for completion in completions]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return [helpful(text) for text in said(completions)]

    def cost(completions: list[Any], **_: Any) -> list[float]:
        return [-harmful(text) for text in said(completions)]

    rows = [
        {"prompt": [{"role": "user", "content": p.text}], "images": [i.load() for i in p.images]}
        for p in make_prompts(work, work.prompts * 4)
    ]
    micro = work.micro_batch or work.rows
    config = GRPOConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=micro, num_generations=work.samples,
        gradient_accumulation_steps=work.rows // micro, steps_per_generation=work.rows // micro,
        max_completion_length=work.new_tokens, temperature=1.0, beta=0.02, learning_rate=1e-5,
        reward_weights=[1.0, 1.0], gradient_checkpointing=work.gradient_checkpointing, bf16=False,
        use_cpu=device.type == "cpu", save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, use_vllm=False,
    )  # fmt: skip
    grpo = GRPOTrainer(
        model=model, reward_funcs=[reward, cost], args=config, train_dataset=Dataset.from_list(rows),
        processing_class=processor, peft_config=lora_config(model, LORA), callbacks=[Times()],
    )  # fmt: skip

    def step() -> float:
        grpo.train()
        return times[-1]

    return step


CONTENDERS = {
    "ours, functions": (False, True),
    "TRL GRPO, functions": (False, True),
    "ours, models": (False, False),
    "ours, models, critics": (True, False),
    "separate, models, critics": (True, False),
}


def contender(name: str, work: Work, device: torch.device, dtype: torch.dtype, folder: Path) -> Step:
    critics, functions = CONTENDERS[name]
    if name.startswith("TRL"):
        return trl_grpo(work, device, dtype, folder)
    if name.startswith("separate"):
        return ours(separate(work, device, dtype), work, device, folder, critics, functions)
    options = {"critics": critics, "gradient_checkpointing": work.gradient_checkpointing}
    return ours(adapter_roles(work, device, dtype, **options), work, device, folder, critics, functions)


def serve(name: str, work: Work, device: torch.device, dtype: torch.dtype) -> None:
    """A contender's process: one update, and a line of JSON, for every line it is sent."""
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not stand between the answers
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        before = peak_bytes(device)
        step = contender(name, work, device, dtype, Path(folder))
        print(json.dumps({"ready": True}), file=answer, flush=True)
        for _ in sys.stdin:
            seconds = step()
            print(json.dumps({"seconds": seconds, "bytes": peak_bytes(device) - before}), file=answer, flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the next contender shares this GPU


def start(name: str, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", name]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log.open("wb"), encoding="utf-8")


def ask(process: subprocess.Popen[str], name: str, log: Path, request: str = "") -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    if request:
        process.stdin.write(request)
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        code, last = process.wait(), log.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no message"]
        how = "was killed: memory may have run out" if code == -signal.SIGKILL else f"ended with {code}: {last[0]}"
        raise SystemExit(f"{name} {how} (its output: {log})")
    return dict(json.loads(line))


def measure_apart(names: list[str], rounds: int, logs: Path) -> dict[str, list[dict[str, Any]]]:
    """The same as `measure` with one process at a time, which makes an update that is not counted in every turn."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in trange(rounds, desc="rounds"):
        for i, name in enumerate(names):
            log = logs / f"{i}.log"
            process = start(name, log)
            try:
                ask(process, name, log)
                ask(process, name, log, "step\n")
                found[name].append(ask(process, name, log, "step\n"))
            finally:
                process.kill()
                process.wait()
    return found


def measure(names: list[str], rounds: int, logs: Path) -> dict[str, list[dict[str, Any]]]:
    """`rounds` updates of each contender, in turns, after one that is not counted."""
    files = {name: logs / f"{i}.log" for i, name in enumerate(names)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in names:
            running[name] = start(name, files[name])
            ask(running[name], name, files[name])
        for turn in range(rounds + 1):
            for name in names:
                answer = ask(running[name], name, files[name], "step\n")
                found[name] += [answer] if turn else []
    finally:
        for process in running.values():
            process.kill()
    return found


def measure_here(names: list[str], work: Work, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The same in this process: it starts sooner, and memory cannot be told apart."""
    folder = Path(tempfile.mkdtemp())
    steps = {name: contender(name, work, device, dtype, folder / str(i)) for i, name in enumerate(names)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            answer = {"seconds": step()}
            found[name] += [answer] if turn else []
    return found


def main() -> None:
    arguments = parser(__doc__ or "", "runs/benchmarks/trainer.json")
    arguments.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments.add_argument("--rounds", type=int, default=5, help="updates of each that count")
    arguments.add_argument("--prompts", type=int, help="prompts of a rollout")
    arguments.add_argument("--samples", type=int, help="responses to each")
    arguments.add_argument("--new-tokens", type=int, help="tokens of a response")
    arguments.add_argument("--pixels", type=int, help="side of a picture; tiny makes (pixels / 16)^2 tokens of it")
    arguments.add_argument("--micro-batch", type=int, help="rows of a pass (default: all)")
    arguments.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    arguments.add_argument("--one-process", action="store_true", help="measure time alone, all in this process")
    arguments.add_argument("--serve", choices=list(CONTENDERS), help="used by the script itself")
    options = arguments.parse_args()
    device, dtype = setting(options)
    work = default_work(options.size)
    asked = ("prompts", "samples", "new_tokens", "pixels", "micro_batch", "gradient_checkpointing")
    work = replace(work, **{name: value for name in asked if (value := getattr(options, name))})
    if work.rows % (work.micro_batch or 1):
        arguments.error(f"--micro-batch {work.micro_batch} does not divide the {work.rows} rows")
    if options.serve:
        return serve(options.serve, work, device, dtype)
    names = [n for n in options.contenders if options.size in SHAPES or not n.startswith("separate")]
    if options.one_process:
        found = measure_here(names, work, options.rounds, device, dtype)
    else:
        together = measure if options.size == "tiny" else measure_apart
        found = together(names, options.rounds, Path(tempfile.mkdtemp()))
    unit, rows = Clock(device).unit, []
    for name in names:
        seconds = statistics.median(answer["seconds"] for answer in found[name])
        first = statistics.median(answer["seconds"] for answer in found[names[0]])
        peak = max(answer.get("bytes", 0) for answer in found[name]) / 2**20
        row = {"contender": name, f"{unit} an update": seconds, f"samples per {unit}": work.rows / seconds}
        rows.append(row | {f"time / {names[0]}": seconds / first, "peak MiB": round(peak) or "-"})
    show(f"{work.prompts} prompts x {work.samples} samples of {work.new_tokens} tokens", rows)
    write(options.out, {"machine": machine(device), "work": asdict(work), "rows": rows, "updates": found})
    return None


if __name__ == "__main__":
    main()
