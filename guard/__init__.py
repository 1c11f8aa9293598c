"""A graded guard over queries and responses with pictures, and the loop that filters and regenerates through it."""

from guard.classifier import Guard, UntrainedKindError
from guard.policy import Policy, PolicyError
from guard.types import Verdict

__all__ = ["Guard", "Policy", "PolicyError", "UntrainedKindError", "Verdict"]
