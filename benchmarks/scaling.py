"""How the cost of a constrained update grows with pictures, samples, response length, vocabulary and batch.

    python benchmarks/scaling.py --size tiny

One factor is varied at a time. The exponent is the slope of log seconds over log factor: 1 is linear, 0 is free.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from common import SHAPES, Clock, Work, adapter_roles, default_work, machine, parser, setting, show, trainer, write

FACTORS = {
    "images": (1, 2, 4, 8),
    "samples": (2, 4, 8, 16),
    "new_tokens": (8, 16, 32, 64),
    "vocabulary": (512, 2048, 8192, 32768),
    "prompts": (2, 4, 8, 16),
}


def seconds(work: Work, device: torch.device, dtype: torch.dtype, critics: bool, repeats: int) -> float:
    """Of one rollout with its update."""
    roles = adapter_roles(work, device, dtype, critics=critics)
    with tempfile.TemporaryDirectory() as folder:
        return Clock(device).time(trainer(roles, work, Path(folder), critics=critics).advance, repeats)


def exponent(values: list[int], times: list[float]) -> float:
    """Least squares on the logarithms."""
    return float(np.polyfit(np.log(values), np.log(times), 1)[0])


def main() -> None:
    arguments = parser(__doc__ or "", "runs/benchmarks/scaling.json")
    arguments.add_argument("--factors", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    arguments.add_argument("--repeats", type=int, default=3, help="measured updates each; the fastest counts")
    arguments.add_argument("--no-critics", action="store_true", help="group_lag in place of ppo_lag")
    options = arguments.parse_args()
    device, dtype = setting(options)
    base, rows, points = default_work(options.size), [], []
    for factor in options.factors:
        values = [v for v in FACTORS[factor] if factor != "vocabulary" or options.size in SHAPES]
        if not values:
            continue  # the vocabulary of a real configuration is what it is
        times = []
        for value in values:
            work = replace(base, **{factor: value})
            times.append(seconds(work, device, dtype, not options.no_critics, options.repeats))
            points.append({"factor": factor, "value": value, "seconds": times[-1]})
        row = {"factor": factor} | {f"point {i + 1}": f"{v}: {t:.3g}" for i, (v, t) in enumerate(zip(values, times))}
        rows.append(row | {"exponent": exponent(values, times)})
    show(f"{Clock(device).unit} of an update, by factor (value: seconds); base {asdict(base)}", rows)
    write(options.out, {"machine": machine(device), "base": asdict(base), "points": points, "rows": rows})


if __name__ == "__main__":
    main()
