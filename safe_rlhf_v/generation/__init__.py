"""Sampling responses: engines behind one protocol."""

from safe_rlhf_v.generation.base import Engine, Sampling
from safe_rlhf_v.generation.transformers_engine import TransformersEngine

__all__ = ["Engine", "Sampling", "TransformersEngine"]
