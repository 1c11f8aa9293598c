"""Which process of a launch this is."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """accelerate's state of this process. On CPUs it must be told, or every rank takes itself for the only one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
