"""Time of each stage of an update against its floor: what the arithmetic and the memory traffic alone would take.

    python benchmarks/stages.py --size tiny

floor = max(FLOPs / measured matrix rate, bytes / measured bandwidth). FLOPs are counted by torch where its counter
knows the operation (attention kernels of a CPU it may not: then the floor is too low). Bytes are the weights, once a
forward pass and twice more a backward pass; keys and values, activations and logits are left out, so this is a floor as
well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Clock, adapter_roles, default_work, machine, parser, setting, show, trainer, write
from torch.utils.flop_counter import FlopCounterMode

from safe_rlhf_v.online.rollout import minibatch
from safe_rlhf_v.vlm.image_features import encode_images


@dataclass(frozen=True, slots=True)
class Stage:
    """weights: bytes of the weights a pass reads; passes: how often they are read."""

    name: str
    work: Callable[[], Any]
    weights: int
    passes: float


def matrix_rate(clock: Clock, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    n = 8192 if clock.device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=clock.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / clock.time(lambda: a @ b, repeats=5)


def bandwidth(clock: Clock) -> float:
    """Bytes/s of a copy, read and written."""
    n = 2**28 if clock.device.type == "cuda" else 2**25
    a, b = (torch.empty(n, device=clock.device) for _ in range(2))
    return 2 * a.numel() * a.element_size() / clock.time(lambda: b.copy_(a), repeats=5)


def flops(work: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def bytes_of(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def stages(online: Any, work: Any) -> list[Stage]:
    """Every stage of one update, on a rollout taken beforehand."""
    roles, drawn = online.roles, online.collect()
    advantages = online.algorithm.advantages(drawn, online.constraint.multiplier, 0.0)
    part = minibatch(drawn, advantages, list(range(len(drawn))))
    inputs, responses = drawn.prompts, drawn.responses
    language = bytes_of(roles.backbone.get_decoder().parameters())
    head = bytes_of(roles.backbone.get_output_embeddings().parameters())
    vision = bytes_of(roles.backbone.get_encoder(modality="image").parameters())
    prompts = roles.encoder.prompts(online.prompts[: work.prompts]).to(online.accelerator.device)
    featured = encode_images(roles.backbone, prompts)

    def quietly(look: Callable[[], Any]) -> Callable[[], Any]:
        return torch.no_grad()(look)

    def learn(name: str) -> Callable[[], None]:
        def work() -> None:
            online.trained[name].optimizer.zero_grad(set_to_none=True)
            online.updater._loss(name, *part)[0].backward()

        return work

    def optimize() -> None:
        for trained in online.trained.values():
            trained.optimizer.step()

    def both() -> list[Any]:
        return [roles.values(inputs, responses, which) for which in ("reward", "cost")]

    fresh = lambda: online.roles.encoder._encode(online.prompts[0], "")  # noqa: E731
    found = [
        Stage("processor, N prompts", lambda: [fresh() for _ in range(work.prompts)], 0, 0),
        Stage("vision tower, N prompts", lambda: encode_images(roles.backbone, prompts), vision, 1),
        Stage("generation", lambda: roles.generate(featured, work.samples, online.sampling), language + head,
              1 + work.new_tokens),
        Stage("log-probabilities, policy", quietly(lambda: roles.logps(inputs, responses)), language + head, 1),
        Stage("log-probabilities, reference", lambda: roles.logps(inputs, responses, "reference"), language + head, 1),
        Stage("reward and cost", lambda: roles.scores(inputs, responses), language, 2),
        Stage("values of two critics", quietly(both), language, 2),
        Stage("update of the policy", learn("policy"), language + head, 3),
        Stage("update of two critics", lambda: [learn(n)() for n in ("reward_value", "cost_value")], language, 6),
    ]  # fmt: skip
    trained = bytes_of(p for t in online.trained.values() for p in t.parameters)
    return [*found, Stage("optimizer steps", optimize, trained, 7)]  # reads w, g, m, v; writes w, m, v


def main() -> None:
    arguments = parser(__doc__ or "", "runs/benchmarks/stages.json")
    arguments.add_argument("--repeats", type=int, default=3, help="measured runs of each stage; the fastest counts")
    options = arguments.parse_args()
    device, dtype = setting(options)
    clock, work, rows = Clock(device), default_work(options.size), []
    rate, speed = matrix_rate(clock, dtype), bandwidth(clock)
    with tempfile.TemporaryDirectory() as folder:
        online = trainer(adapter_roles(work, device, dtype, critics=True), work, Path(folder), critics=True)
        for stage in stages(online, work):
            seconds, count = clock.time(stage.work, options.repeats), flops(stage.work)
            arithmetic, traffic = count / rate, stage.weights * stage.passes / speed
            floor = max(arithmetic, traffic)
            limit = "arithmetic" if arithmetic >= traffic else "bandwidth"
            row = {"stage": stage.name, clock.unit: seconds, "GFLOP": count / 1e9, "floor": floor}
            rows.append(row | {"limit": limit if floor else "-", "time / floor": seconds / floor if floor else "-"})
    shown = f"{rate / 1e9:.0f} GFLOP/s, {speed / 1e9:.1f} GB/s"
    show(f"{work.prompts} prompts x {work.samples} samples of {work.new_tokens} tokens; {shown}", rows)
    measured = {"flop_per_second": rate, "bytes_per_second": speed}
    write(options.out, {"machine": machine(device) | measured, "work": asdict(work), "rows": rows})


if __name__ == "__main__":
    main()
