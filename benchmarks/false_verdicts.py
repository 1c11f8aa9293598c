"""How often a comparison errs, and what it finds, where seeds differ: the intervals of comparison/crossed.py.

    python benchmarks/false_verdicts.py [--tables 40000]

Tables over S seeds and P prompts, normal, drawn by their sufficient statistics. `seeds` is the share of the mean's
variance that the seeds give. Three ways to test a mean of 0: Satterthwaite's degrees of freedom, the same variance
with S - 1, and the two quantiles of `half_width`. Alone: at .05. Of 13: at least one of thirteen claims, by Holm.
Power: an effect of 4 standard errors alone, and of 8 at the first step of Holm's thirteen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from safe_rlhf_v.comparison.crossed import half_width

Array = NDArray[np.float64]
Rule = Callable[[Array, Array, Array, tuple[int, int], float], Array]
PROMPTS, CLAIMS, ALPHA = 150, 13, 0.05


def satterthwaite(seed: Array, prompt: Array, rest: Array, shape: tuple[int, int], alpha: float) -> Array:
    """Half the interval, from the three mean squares over S P."""
    seeds, prompts = shape
    variance = np.maximum(np.maximum(seed + prompt - rest, seed), prompt)
    spread = seed**2 / (seeds - 1) + prompt**2 / (prompts - 1) + rest**2 / (seeds - 1) / (prompts - 1)
    return stats.t.isf(alpha / 2, np.minimum(variance**2 / spread, prompts - 1)) * np.sqrt(variance)  # type: ignore[no-any-return]


def capped(seed: Array, prompt: Array, rest: Array, shape: tuple[int, int], alpha: float) -> Array:
    variance = np.maximum(np.maximum(seed + prompt - rest, seed), prompt)
    return stats.t.isf(alpha / 2, shape[0] - 1) * np.sqrt(variance)  # type: ignore[no-any-return]


def both(seed: Array, prompt: Array, rest: Array, shape: tuple[int, int], alpha: float) -> Array:
    return half_width((seed, np.maximum(prompt - np.minimum(seed, rest), 0)), shape, alpha)


RULES: dict[str, Rule] = {"Satterthwaite": satterthwaite, "S - 1": capped, "both": both}


def rates(seeds: int, share: float, cells: float, tables: int) -> dict[str, tuple[float, float, float, float]]:
    """Rule -> (level alone, of 13, power alone, at Holm's first step). cells: their deviation, the prompts' being 1."""
    rng, shape = np.random.default_rng([seeds, int(1000 * share)]), (seeds, PROMPTS)
    size, noise = seeds * PROMPTS, cells**2
    fixed = 1 / PROMPTS + noise / size
    of_seeds = fixed * share / (1 - share) * seeds  # variance of a_s
    square = lambda mean, df: mean * rng.chisquare(df, tables) / df / size  # noqa: E731
    parts = (
        square(PROMPTS * of_seeds + noise, seeds - 1),
        square(seeds + noise, PROMPTS - 1),
        square(noise, (seeds - 1) * (PROMPTS - 1)),
    )
    error = (fixed + of_seeds / seeds) ** 0.5
    mean = rng.normal(0, error, tables)
    found = {}
    for name, rule in RULES.items():
        alone, first = (rule(*parts, shape, alpha) for alpha in (ALPHA, ALPHA / CLAIMS))
        family = 1 - (1 - (abs(mean) > first).mean()) ** CLAIMS
        power = (abs(mean + 4 * error) > alone).mean(), (abs(mean + 8 * error) > first).mean()
        found[name] = (float((abs(mean) > alone).mean()), float(family), float(power[0]), float(power[1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=40_000, help="drawn for each line")
    tables = parser.parse_args().tables
    print("Each cell: " + " / ".join(RULES))
    print("| S | cells | seeds | alone | of 13 | power alone | power of 13 |\n" + "|---" * 7 + "|")
    for seeds in (3, 5, 8):
        for cells in (1.0, 3.0):
            for share in (0.0, 0.2, 0.5, 0.8, 0.95, 0.999):
                found = rates(seeds, share, cells, tables).values()
                columns = [" / ".join(f"{one[i]:.3f}" for one in found) for i in range(4)]
                print(f"| {seeds} | {cells:g} | {share:g} | " + " | ".join(columns) + " |", flush=True)


if __name__ == "__main__":
    main()
