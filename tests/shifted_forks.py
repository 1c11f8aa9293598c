"""What `forks.serve` imports first: the processes of a test shift their seeds as the test does."""

import os

from shifted_seeds import shift_seeds

if by := int(os.environ.get("SHIFT_SEEDS", "0")):
    shift_seeds(by)
