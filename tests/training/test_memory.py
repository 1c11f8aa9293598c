"""Memory that runs out in the online loop: smaller micro-batches, the same results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_roles import DEMONSTRATIONS, PROMPTS, FakeRoles, trainer
from rounding import close

from safe_rlhf_v.online.micro_batches import OutOfMemory
from safe_rlhf_v.online.rollout import Passes, sample
from safe_rlhf_v.online.updates import Updater
from safe_rlhf_v.roles.scorers import ModelScorer

# No sampling in these runs may depend on how many rows are drawn together: only the passes run out of memory.
RUN: dict[str, Any] = {"max_steps": 3, "mini_batch_size": 6, "demonstrations": DEMONSTRATIONS, "ptx_coeff": 0.5}


class Small(FakeRoles):
    """Has memory for `room` rows. Runs out either in the forward or, leaving half a gradient, in the backward pass."""

    def __init__(self, room: int, backward: bool = False) -> None:
        super().__init__()
        self.room, self.backward, self.failed = room, backward, 0

    def _look(self, output: torch.Tensor) -> torch.Tensor:
        if output.shape[0] <= self.room:
            return output
        if not self.backward:
            return self._fail(output)
        if output.requires_grad:
            output.register_hook(self._fail)
        return output

    def _fail(self, gradient: torch.Tensor) -> torch.Tensor:
        self.failed += 1
        if self.backward:
            self.policy.head.weight.grad = torch.full_like(self.policy.head.weight, 1e3)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def logps(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._look(super().logps(*args, **kwargs))

    def values(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._look(super().values(*args, **kwargs))


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("backward", [False, True])
def test_the_run_goes_on_with_the_same_results(
    tmp_path: Path, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plain, small = trainer(tmp_path / "a", **RUN), trainer(tmp_path / "b", roles=Small(2, backward), **RUN)
        rows = [run.train().metrics for run in (plain, small)]
    assert small.roles.failed == 2 and small.passes.looks.halved == 1, "6 rows, then 3, then one by one"
    assert "out of memory with 6 samples in a pass: going on with at most 3" in caplog.text
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run] for run in rows]
    close(rows[1], rows[0])
    close(small.roles.state_dict(), plain.roles.state_dict(), FakeRoles().state_dict())


def test_demonstrations_that_do_not_fit_leave_no_gradient_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's part fitted, the demonstrations did not: neither gradient may count twice."""
    run, real, stumbled = dict(RUN, max_steps=1, num_ppo_epochs=1), Updater._imitate, [1]

    def stumble(self: Updater, shown: Any) -> float:
        loss = real(self, shown)
        if not stumbled:
            stumbled.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(Updater, "_imitate", stumble)
    norms = []
    for name in ("plain", "stumbling"):
        norms.append(trainer(tmp_path / name, **run).train().metrics[0]["policy_grad_norm"])
        stumbled.clear()
    close(norms[1], norms[0])


def test_generation_that_does_not_fit_is_done_in_parts() -> None:
    """From the same random state, the longest prompt first; every prompt keeps its own answers, and pads are pads."""

    class Narrow(FakeRoles):
        def generate(self, inputs: Any, samples: int, sampling: Any) -> Any:
            asked.append(len(inputs))
            if len(inputs) > 2:
                torch.rand(7)  # it had begun to draw
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().generate(inputs, samples, sampling)

    roles, sampling, passes = Narrow(), trainer("unused").sampling, Passes.bounded()
    asked: list[int] = []
    torch.manual_seed(5)
    drawn = sample(roles, ModelScorer(roles), PROMPTS, sampling, 3, device="cpu", passes=passes)
    assert asked == [7, 3] + [1] * 7 and passes.draws.halved == 1
    assert len(drawn.responses) == 21 and not drawn.responses.ids[~drawn.responses.mask].any()
    torch.manual_seed(5)
    first = roles.encoder.prompts([PROMPTS[6]])
    assert torch.equal(drawn.responses.ids[18:], roles.generate(first, 3, sampling).ids)


def test_a_sample_that_does_not_fit_alone_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match="one sample"):
        trainer(tmp_path, roles=Small(0), **RUN).train()


def test_a_resumed_run_knows_what_did_not_fit(tmp_path: Path) -> None:
    trainer(tmp_path, roles=Small(2), **RUN).train()
    resumed = trainer(tmp_path, roles=Small(2), **dict(RUN, max_steps=4))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.roles.failed == 0 and resumed.passes.looks.halved == 1
