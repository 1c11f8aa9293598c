"""What an engine is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from beavertails_v.schema import Prompt
from safe_rlhf_v.arguments import Sampling
from safe_rlhf_v.types import Inputs, Responses


class Engine(Protocol):
    """Draws responses of the current policy."""

    def generate(
        self, inputs: Inputs, samples: int, sampling: Sampling, prompts: Sequence[Prompt] = ()
    ) -> Responses:
        """`samples` responses per prompt, N prompts to B = N * samples rows; rows of one prompt stand together.

        prompts: what `inputs` was made of, for an engine that encodes texts and pictures by itself.
        """
        ...
