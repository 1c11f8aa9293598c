"""PPO-Lagrangian of Safe RLHF-V (arXiv 2503.17682): min over theta, max over lam of -J_R + lam (E[c] - d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from safe_rlhf_v.algorithms.constrained import Lagrangian
from safe_rlhf_v.algorithms.two_critics import TwoCritics
from safe_rlhf_v.types import Advantages, Rollout


@dataclass(frozen=True, kw_only=True)
class PPOLag(TwoCritics, Lagrangian):
    """Two critics, two streams, one advantage A = (A_r - lam A_c) / (1 + lam). Defaults: the released code.

    threshold: d, the bound on the mean cost (text Safe RLHF, arXiv 2310.12773: 0, with beta .01).
    With `duals.fixed(lam)` it is PPO with reward shaping, R - lam C; with `duals.fixed(0)`, plain PPO on the reward.
    """

    words: ClassVar[str] = "Safe RLHF-V's, with two critics"
    threshold: Annotated[float, "Bound d on the mean cost. [code] -0.5"] = -0.5

    def advantages(self, rollout: Rollout, multiplier: float, violation: float = 0.0) -> Advantages:
        return self.streams(rollout).weighed(multiplier)
