"""The benchmarks run: their contenders at the smallest size, nothing timed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common
import pairs
import scaling
import stages
import trainer

CPU, WORK = torch.device("cpu"), common.Work(prompts=2, samples=2, new_tokens=3)


@pytest.mark.parametrize("name", trainer.CONTENDERS)
def test_every_contender_makes_an_update_of_the_same_size(name: str, tmp_path: Path) -> None:
    """Their responses run to the limit, in ours and in TRL's: nobody saves work by ending early."""
    made: list[torch.Size] = []
    real = torch.nn.functional.linear

    def spy(x: Any, weight: Any, *args: Any) -> Any:
        made.append(x.shape) if weight.shape[0] == words else None
        return real(x, weight, *args)

    words = len(common.build(WORK, CPU, torch.float32)[1].tokenizer)
    step = trainer.contender(name, WORK, CPU, torch.float32, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", spy)
        assert step() >= 0
    decoded = [shape for shape in made if len(shape) == 3 and shape[:2] == (4, 1)]
    assert len(decoded) == 3, "four rows, token by token"


def test_the_exponent_is_the_slope_of_the_logarithms() -> None:
    assert scaling.exponent([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert scaling.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert scaling.seconds(replace(WORK, images=2, vocabulary=600), CPU, torch.float32, True, 1) > 0


def test_the_vocabulary_is_as_asked() -> None:
    model, processor = common.build(replace(WORK, vocabulary=600), CPU, torch.float32)
    assert model.get_output_embeddings().weight.shape[0] == len(processor.tokenizer) == 600


def test_every_stage_runs_and_is_counted(tmp_path: Path) -> None:
    roles = common.adapter_roles(WORK, CPU, torch.float32, critics=True)
    online = common.trainer(roles, WORK, tmp_path, critics=True)
    counts = {stage.name: stages.flops(stage.work) for stage in stages.stages(online, WORK)}
    assert counts.pop("processor, N prompts") == counts.pop("optimizer steps") == 0
    assert all(count > 0 for count in counts.values())
    # both critics are two networks of the policy's size, without an output layer
    assert 1.5 < counts["update of two critics"] / counts["update of the policy"] < 2.0


def test_a_pair_is_read_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "pairs.json"
    monkeypatch.setattr(sys, "argv", ["pairs.py", "--device=cpu", "--rounds=2", "--new-tokens=3", f"--out={out}"])
    threads = torch.get_num_threads()
    pairs.main()
    torch.set_num_threads(threads)
    found = json.loads(out.read_text())["seconds"]
    assert {name: len(times) for name, times in found.items()} == {"once with each response": 2, "once a pair": 2}
