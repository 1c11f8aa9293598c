"""Shared by the tests of training."""

import pytest
import torch
from rounding import smooth_adamw


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of AdamW that follow their gradients (tests/rounding.py)."""
    monkeypatch.setattr(torch.optim.AdamW, "__init__", torch.optim.AdamW.__init__)  # what is put back
    smooth_adamw()
