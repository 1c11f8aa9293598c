"""`pytest --shift-seeds N`: every seed given to torch, numpy, random or Hypothesis from here on is another one.

What a test asserts must hold for any draw. One that holds for the seed it was written with alone hangs on the
processor as well: other instructions round otherwise, and another token is drawn.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hypothesis import core


def shifted(seed: Any, by: int) -> Any:
    """Equal seeds stay equal and different ones different. None, which draws one, stays None."""
    if seed is None or isinstance(seed, np.random.SeedSequence | np.random.BitGenerator | np.random.Generator):
        return seed
    if isinstance(seed, int | np.integer):
        return int(seed) + by
    return f"{seed}+{by}" if isinstance(seed, str) else [*seed, by]


def shift_seeds(by: int) -> None:
    """For the life of this process. Seeds that the code under test sets, such as those of settings, move as well."""

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(shifted(seed, by))

    class Random(random.Random):
        def seed(self, a: Any = None, version: int = 2) -> None:
            super().seed(shifted(a, by), version)

    torch.Generator, random.Random = Generator, Random  # type: ignore[misc]
    for module, name in ((torch, "manual_seed"), (random, "seed"), (np.random, "seed"), (np.random, "default_rng")):
        setattr(module, name, _with_shifted_seed(getattr(module, name), by))
    core.global_force_seed = by  # what --hypothesis-seed sets


def _with_shifted_seed(function: Any, by: int) -> Any:
    return lambda seed=None, *rest: function(shifted(seed, by), *rest)
