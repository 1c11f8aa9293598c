"""What an engine is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from beavertails_v.schema import Prompt
from safe_rlhf_v.types import Inputs, Responses


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn. temperature 0 is greedy; top_p 1 and top_k 0 leave the distribution whole.

    Policy-gradient training wants it whole: `token_logps` knows the temperature and the suppressed ids, not top-p.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                f"{self}: max_new_tokens must be at least 1, temperature and top_k at least 0, top_p in (0, 1]"
            )


class Engine(Protocol):
    """Draws responses of the current policy."""

    def generate(
        self, inputs: Inputs, samples: int, sampling: Sampling, prompts: Sequence[Prompt] = ()
    ) -> Responses:
        """`samples` responses per prompt, N prompts to B = N * samples rows; rows of one prompt stand together.

        prompts: what `inputs` was made of, for an engine that encodes texts and pictures by itself.
        """
        ...
