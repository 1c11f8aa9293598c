"""The command `safe-rlhf-v`. Importing it is cheap: commands import torch and transformers only when they run."""

from safe_rlhf_v.cli.main import app

__all__ = ["app"]
