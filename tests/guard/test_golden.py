"""The self-test: a guard that lost its eyes never becomes ready."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from guard.classifier import Guard
from guard.golden import GoldenError, self_test, write_golden
from tests.guard.conftest import rows


@pytest.fixture
def folder(guard: Guard, tmp_path: Path) -> Path:
    items = rows()
    replies = [None if i % 2 else row.response.text for i, row in enumerate(items)]
    assert write_golden(guard, tmp_path, [row.prompt for row in items], replies, most=6) > 1
    return tmp_path


def test_a_guard_passes_its_own_test(guard: Guard, folder: Path) -> None:
    assert self_test(guard, folder) == len(json.loads((folder / "golden.json").read_text())["cases"])


def test_other_vision_weights_do_not_pass(guard: Guard, folder: Path) -> None:
    tower = guard.model.backbone.get_parameter(
        next(n for n, p in guard.model.backbone.named_parameters() if "vision" in n and p.dim() > 1)
    )
    kept = tower.detach().clone()
    guard.keep_pictures(0)  # features of the sound tower are kept else
    try:
        with torch.no_grad():
            tower.normal_(std=3.0)
        with pytest.raises(GoldenError, match=r"self-test: case \d"):
            self_test(guard, folder)
    finally:
        with torch.no_grad():
            tower.copy_(kept)
        guard.keep_pictures(2**20)


def test_a_guard_without_known_inputs_is_told_how_to_get_some(guard: Guard, tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="guard self-test"):
        self_test(guard, tmp_path)
    (tmp_path / "golden.json").write_text('{"cases": [{"text": 1}]}')
    with pytest.raises(ValueError, match=r"golden\.json is not what training writes"):
        self_test(guard, tmp_path)
