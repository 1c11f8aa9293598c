"""Which process of a launch this is."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """accelerate's state of this process. On CPUs it must be told, or every rank takes itself for the only one.

    Of several processes that `accelerate launch` starts with torchrun none is told so.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    )
