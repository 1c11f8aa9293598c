"""CRPO, constraint-rectified policy optimisation (arXiv 2011.05869): no multiplier, one objective at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from safe_rlhf_v.algorithms.constrained import Bounded
from safe_rlhf_v.algorithms.two_critics import TwoCritics
from safe_rlhf_v.fields import NonNegative
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class CRPO(TwoCritics, Bounded):
    """A = A_r while J_c <= d + tolerance, else A = -A_c [secondary], on PPO and with the KL in both streams [ours].

    Near the bound it switches to and fro. A share s of cost steps acts as the multiplier s / (1 - s), so it hovers
    about PPO-Lagrangian's solution for the threshold d + tolerance, within a step's length. The paper returns the mean
    over the iterates that keep the bound; here it is the last one [ours]. The window is short: with a long one a switch
    comes late and overshoots.
    """

    words: ClassVar[str] = "no multiplier, one objective at a time"
    tolerance: Annotated[NonNegative, "eta: cost is lowered while its mean is above threshold + tolerance."] = 0.0

    def advantages(self, rollout: Rollout, multiplier: float, violation: float) -> Advantages:
        both = self.streams(rollout)
        return both.advantages(-both.cost if violation > self.tolerance else both.reward)
