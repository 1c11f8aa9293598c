"""Records of a guard that were changed or cut are one sentence."""

import json
from pathlib import Path

import pytest

from guard.calibration import Calibration
from guard.classifier import SPEC_FILE, _spec
from safe_rlhf_v.vlm.weights import DamagedFile


@pytest.mark.parametrize("content", ["{}", "[]", "{", "", '{"categories": 5, "kinds": []}'])
def test_a_damaged_spec_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / SPEC_FILE).write_text(content)
    with pytest.raises(DamagedFile, match=SPEC_FILE):
        _spec(tmp_path / SPEC_FILE)


def test_a_damaged_calibration_is_named(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    Calibration(weights="w").save(file)
    row = json.loads(file.read_text())
    for content in ("[]", "{", "{}", json.dumps(row | {"temperatures": {"query": 0}})):
        file.write_text(content)
        with pytest.raises(DamagedFile, match="calibration.json"):
            Calibration.load(file)
