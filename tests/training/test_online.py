"""The online loop on fake roles: what it does in a step, what it learns, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_roles import BAD, DEMONSTRATIONS, GOOD, PROMPTS, FakeRoles, arguments, trainer

from safe_rlhf_v.algorithms.crpo import CRPO
from safe_rlhf_v.algorithms.group_lag import GroupLag
from safe_rlhf_v.algorithms.imitation import Imitation
from safe_rlhf_v.algorithms.p3o import P3O
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.algorithms.repo import RePO
from safe_rlhf_v.algorithms.rloo_lag import RLOOLag
from safe_rlhf_v.cost_measures import CVaR, HighConfidence, Mean
from safe_rlhf_v.duals import AdditiveDual, AugmentedDual, LogDual, PIDDual, fixed
from safe_rlhf_v.losses import clipped_value_loss
from safe_rlhf_v.online.loop import OnlineTrainer
from safe_rlhf_v.online.rollout import Passes, collect, minibatch
from safe_rlhf_v.online.updates import Trained
from safe_rlhf_v.roles.scorers import ModelScorer, TextScorer
from safe_rlhf_v.training.checkpoint import CheckpointError, checkpoints, latest_checkpoint
from safe_rlhf_v.types import Advantages

KEYS = {
    "step", "reward", "cost", "violation", "multiplier", "kl", "policy_loss", "reward_value_loss", "cost_value_loss",
    "response_length", "unsafe_share", "clip_fraction", "entropy", "seconds",
}  # fmt: skip


def parameters(trainer: OnlineTrainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.roles.state_dict().values()]


def same(first: OnlineTrainer, second: OnlineTrainer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))


def mean(rows: list[dict[str, Any]], name: str, part: slice) -> float:
    values = [row[name] for row in rows[part]]
    return sum(values) / len(values)


REPO = [RePO(), RePO(form="gated"), RePO(form="per_prompt", margin=0.1, window=5)]
ALGORITHMS = [PPOLag(threshold=-0.2), *REPO, CRPO(), P3O(), GroupLag(), RLOOLag(), Imitation()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_and_writes_its_records(tmp_path: Path, algorithm: Any) -> None:
    run = trainer(tmp_path, algorithm, AdditiveDual(0.1, 1.0, 5.0), max_steps=3)
    result = run.train()
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    critics = {"reward_value_loss", "cost_value_loss"}
    assert set(result.metrics[0]) >= (KEYS if algorithm.critics else KEYS - critics)
    assert all(math.isfinite(value) for row in result.metrics for value in row.values())
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    saved = torch.load(result.policy_dir / "policy.pt")
    assert torch.equal(saved["head.weight"], run.roles.policy.head.weight)


def test_critic_free_algorithms_need_no_critics(tmp_path: Path) -> None:
    trainer(tmp_path, GroupLag(), max_steps=2, roles=FakeRoles(critics=False)).train()


@pytest.mark.parametrize("algorithm", [PPOLag(beta=0.0), GroupLag(beta=0.0)])
def test_with_multiplier_0_the_reward_rises_whatever_the_cost(tmp_path: Path, algorithm: Any) -> None:
    fixed = AdditiveDual(0.0, 0.0, 0.0)
    rows = trainer(
        tmp_path, algorithm, fixed, max_steps=40, num_generations=6, mini_batch_size=18, learning_rate=0.02
    ).train().metrics  # fmt: skip
    assert mean(rows, "reward", slice(-5, None)) > mean(rows, "reward", slice(0, 5)) + 1.5
    assert {row["multiplier"] for row in rows} == {0.0}


def test_a_large_multiplier_brings_the_cost_down(tmp_path: Path) -> None:
    """Reward and cost both count the BAD tokens: without the multiplier there would be ever more of them."""

    def scorer(prompts: Any, inputs: Any, responses: Any) -> tuple[torch.Tensor, torch.Tensor]:
        bad = ((responses.ids == BAD) & responses.mask).sum(1).float()
        return bad, bad - 0.5

    fixed = AdditiveDual(0.0, 100.0, 100.0)
    changes: dict[str, Any] = {"max_steps": 40, "num_generations": 6, "mini_batch_size": 18, "learning_rate": 0.02}
    rows = trainer(tmp_path, PPOLag(beta=0.0), fixed, scorer=scorer, **changes).train().metrics
    assert mean(rows, "unsafe_share", slice(-5, None)) < 0.5 * mean(rows, "unsafe_share", slice(0, 5))


def test_the_advantages_are_taken_at_the_multiplier_that_has_just_moved(tmp_path: Path) -> None:
    given: list[float] = []

    class Spy(PPOLag):
        def advantages(self, rollout: Any, multiplier: float, violation: float = 0.0) -> Advantages:
            given.append(multiplier)
            return super().advantages(rollout, multiplier, violation)

    rows = trainer(tmp_path, Spy(threshold=-0.2, delay=0), AdditiveDual(0.1, 1.0, 5.0), max_steps=3).train().metrics
    assert given == [row["multiplier"] for row in rows]
    assert len({1.0, *given}) == 4


def test_the_multiplier_moves_once_a_rollout_on_all_its_costs(tmp_path: Path) -> None:
    run = trainer(tmp_path, PPOLag(threshold=-0.2, window=0, delay=0), LogDual(0.1, 1.0, 5.0), num_ppo_epochs=3)
    rows = run.train().metrics
    lam = 1.0
    for row in rows:
        assert row["violation"] == pytest.approx(row["cost"] + 0.2)
        lam = min(5.0, lam * math.exp(0.1 * row["violation"] * lam))
        assert row["multiplier"] == pytest.approx(lam)


def test_the_violation_is_that_of_the_last_window_of_costs(tmp_path: Path) -> None:
    rows = trainer(tmp_path, PPOLag(threshold=0.0, window=12)).train().metrics  # 6 costs a rollout: the last two
    for before, row in pairwise(rows):
        assert row["violation"] == pytest.approx((before["cost"] + row["cost"]) / 2, abs=1e-6)


def test_a_window_shorter_than_a_rollout_drops_none_of_its_costs(tmp_path: Path) -> None:
    """6 costs a rollout: a window of 4 would leave out the first prompt's, and on several machines whole ranks'."""
    rows = trainer(tmp_path, PPOLag(threshold=0.0, window=4)).train().metrics
    for row in rows:
        assert row["violation"] == pytest.approx(row["cost"], abs=1e-6)


@pytest.mark.parametrize("window", [0, 12])
def test_the_measure_is_taken_of_the_known_costs(tmp_path: Path, window: int) -> None:
    """The violation is that of the statistic over window or rollout; the algorithm sees the measured costs."""
    seen: list[torch.Tensor] = []

    class Spy(PPOLag):
        def advantages(self, rollout: Any, multiplier: float, violation: float = 0.0) -> Advantages:
            seen.append(rollout.costs)
            return super().advantages(rollout, multiplier, violation)

    measure = HighConfidence(0.5)
    run = trainer(tmp_path, Spy(threshold=0.2, window=window), max_steps=4, measure=measure)
    plain = trainer(tmp_path / "raw", PPOLag(threshold=0.2), max_steps=1)
    rows = run.train().metrics
    assert rows[0]["cost"] == plain.train().metrics[0]["cost"]  # what is logged is the cost itself
    if window:
        known = torch.tensor(list(run.constraint.costs)).double()
        statistic = known.mean() + 0.5 * known.std(correction=0)
        assert rows[-1]["violation"] == pytest.approx(statistic.item() - 0.2, abs=1e-6)
    else:
        for costs, row in zip(seen, rows, strict=True):
            assert costs.double().mean().item() - 0.2 == pytest.approx(row["violation"], abs=1e-6)
        spread = [row["violation"] - (row["cost"] - 0.2) for row in rows]  # none where all costs are equal
        assert min(spread) > -1e-6 and max(spread) > 1e-3


def test_the_algorithm_is_given_the_violation_the_multiplier_moved_by(tmp_path: Path) -> None:
    given: list[float] = []

    class Spy(CRPO):
        def advantages(self, rollout: Any, multiplier: float, violation: float) -> Advantages:
            given.append(violation)
            return super().advantages(rollout, multiplier, violation)

    rows = trainer(tmp_path, Spy(), fixed(0.0), max_steps=3).train().metrics
    assert given == [row["violation"] for row in rows] and {row["multiplier"] for row in rows} == {0.0}


@pytest.mark.parametrize(("dual", "warnings"), [(fixed(5.0), 0), (AugmentedDual(0.1, 5.0, 5.0, rho=1.0), 1)])
def test_a_rule_at_its_bound_is_reported_and_a_fixed_multiplier_is_not(
    tmp_path: Path, dual: Any, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, PPOLag(threshold=-9.0, delay=0), dual, max_steps=3, multiplier_patience=3).train()
    assert caplog.text.count("may be infeasible") == warnings


@pytest.mark.parametrize(("alpha", "warnings"), [(0.9, 1), (0.5, 0)])
def test_a_cvar_of_too_few_costs_is_reported(
    tmp_path: Path, alpha: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The worst tenth of 6 costs is the largest of them: measured so, all are alike, and the policy learns nothing."""
    scorer = lambda prompts, inputs, responses: (torch.zeros(6), torch.arange(6.0))  # noqa: E731
    trainer(tmp_path, CRPO(), fixed(0.0), measure=CVaR(alpha), max_steps=3, scorer=scorer).train()
    assert caplog.text.count("gives all of 6 costs the same value, 5") == warnings


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_the_first_steps_of_the_multiplier_are_delayed(tmp_path: Path, delay: int) -> None:
    rows = trainer(tmp_path, PPOLag(threshold=-5.0, delay=delay), LogDual(0.1, 1.0, 50.0), max_steps=5).train().metrics
    assert [row["multiplier"] > 1.0 for row in rows] == [step > delay for step in range(1, 6)]


def test_mistake_10_the_multiplier_moves_in_proportion_to_the_violation(tmp_path: Path) -> None:
    moves = []
    for scale in (1e-3, 1e-1):
        scorer = lambda prompts, inputs, responses: (torch.zeros(len(prompts)), torch.full((len(prompts),), scale))  # noqa: B023, E731
        algorithm = PPOLag(threshold=0.0, delay=0)
        run = trainer(tmp_path / str(scale), algorithm, AdditiveDual(0.1, 1.0, 5.0), max_steps=1, scorer=scorer)
        moves.append(run.train().metrics[0]["multiplier"] - 1.0)
    assert moves[1] / moves[0] == pytest.approx(100, rel=1e-4)


def test_pictures_are_prepared_once_a_prompt_and_rollout(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=2, guidance_rollouts=0)
    run.train()
    assert run.roles.prepared == [3, 3]  # N prompts, not N*G rows, and once


def test_rows_of_a_rollout_stand_in_groups() -> None:
    roles = FakeRoles()
    rollout = collect(
        roles, ModelScorer(roles), PROMPTS[:2], trainer("unused").sampling, 3, critics=True, device="cpu"
    )  # fmt: skip
    assert rollout.group_size == 3 and len(rollout) == 6
    assert torch.equal(rollout.prompts.input_ids, roles.encoder.prompts(PROMPTS[:2]).input_ids.repeat_interleave(3, 0))
    assert rollout.logps.shape == rollout.ref_logps.shape == rollout.cost_values.shape == rollout.responses.ids.shape


def test_a_rollout_taken_in_parts_is_the_same_rollout() -> None:
    roles, sampling, rollouts = FakeRoles(), trainer("unused").sampling, []
    scorer = TextScorer(lambda prompt, text: (len(prompt.text), len(text)), roles.encoder.decode)
    for passes in (None, Passes.bounded(4), Passes.bounded(tokens=20)):
        torch.manual_seed(3)
        options: dict[str, Any] = {"critics": True, "device": "cpu", "passes": passes}
        rollouts.append(collect(roles, scorer, PROMPTS[:3], sampling, 3, **options))
    mask = rollouts[0].responses.mask
    for other in rollouts[1:]:
        assert torch.equal(other.responses.ids, rollouts[0].responses.ids)
        for name in ("rewards", "costs"):
            torch.testing.assert_close(getattr(rollouts[0], name), getattr(other, name))
        for name in ("logps", "ref_logps", "reward_values", "cost_values"):
            torch.testing.assert_close(getattr(rollouts[0], name)[mask], getattr(other, name)[mask])


def test_minibatches_are_cut_to_their_longest_response() -> None:
    roles = FakeRoles()
    rollout = collect(roles, ModelScorer(roles), PROMPTS, trainer("unused").sampling, 2, critics=True, device="cpu")
    mask = torch.arange(5) < torch.tensor([1, 2, 5] + [3] * 11)[:, None]
    rollout = replace(rollout, responses=replace(rollout.responses, mask=mask))
    advantages = Advantages(policy=torch.randn(14, 5), reward_returns=torch.randn(14, 5))
    part, cut = minibatch(rollout, advantages, [1, 0])
    assert part.responses.ids.shape == part.logps.shape == part.cost_values.shape == cut.policy.shape == (2, 2)
    assert torch.equal(part.logps, rollout.logps[[1, 0], :2]) and cut.cost_returns is None
    assert torch.equal(part.rewards, rollout.rewards[[1, 0]])


def test_micro_batches_give_the_gradient_of_the_whole_minibatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: dict[str, list[torch.Tensor]] = {}

    def note(self: Trained, accelerator: Any, step: int) -> float:
        gradients[size] += [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(Trained, "step", note)
    bounds: dict[str, dict[str, int]] = {"whole": {}, "tokens": {"tokens": 14}}
    bounds |= {f"rows {n}": {"size": n} for n in (1, 4, 5)}
    for size, bound in bounds.items():
        gradients[size] = []
        options: dict[str, Any] = {"demonstrations": DEMONSTRATIONS, "ptx_coeff": 0.5, "num_ppo_epochs": 1}
        options |= {f"per_device_micro_batch_{name}": value for name, value in bound.items()}
        trainer(tmp_path / size, max_steps=1, mini_batch_size=6, **options).train()
    assert any(g.any() for g in gradients["whole"])
    for size in bounds:
        for whole, parts in zip(gradients["whole"], gradients[size], strict=True):
            torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("which", ["reward", "cost"])
def test_mistake_5_each_critic_learns_its_own_returns_from_its_own_old_values(which: str) -> None:
    run = trainer("unused", PPOLag(value_clip=0.01))  # so narrow that the old values decide the loss
    rollout = collect(run.roles, run.scorer, PROMPTS, run.sampling, 2, critics=True, device="cpu")
    name = f"{which}_values"
    rollout = replace(rollout, **{name: getattr(rollout, name) + 1.0})
    advantages = run.algorithm.advantages(rollout, 1.0)
    loss, _ = run.updater._loss(f"{which}_value", rollout, advantages)
    values = run.roles.values(rollout.prompts, rollout.responses, which)
    returns = getattr(advantages, f"{which}_returns")
    want = clipped_value_loss(values, getattr(rollout, name), returns, rollout.responses.mask, 0.01)
    assert loss.item() == want.item()


def test_demonstrations_are_imitated(tmp_path: Path) -> None:
    quiet = {"scorer": lambda prompts, inputs, responses: (torch.zeros(len(prompts)), torch.zeros(len(prompts)))}
    run = trainer(tmp_path, PPOLag(beta=0.0), max_steps=20, demonstrations=DEMONSTRATIONS, ptx_coeff=1.0, **quiet)
    rows = run.train().metrics
    assert rows[-1]["ptx_loss"] < 0.5 * rows[0]["ptx_loss"]


def test_imitation_alone_moves_by_the_demonstrations_and_by_nothing_else(tmp_path: Path) -> None:
    """Rewards and costs a thousand times as large give the same policy; without the term nothing changes."""
    runs = []
    for scale in (1.0, 1000.0):
        scorer = lambda prompts, inputs, responses: 2 * (torch.full((len(prompts),), scale),)  # noqa: B023, E731
        options: dict[str, Any] = {"demonstrations": DEMONSTRATIONS, "ptx_coeff": 1.0, "scorer": scorer}
        run = trainer(tmp_path / f"{scale}", Imitation(), fixed(0.0), max_steps=4, **options)
        runs.append((run, run.train().metrics))
    assert runs[0][1][-1]["ptx_loss"] == runs[1][1][-1]["ptx_loss"] < runs[0][1][0]["ptx_loss"]
    assert same(runs[0][0], runs[1][0])
    still = trainer(tmp_path / "still", Imitation(), fixed(0.0), max_steps=2)
    before = parameters(still)
    still.train()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(still), strict=True))


def test_without_demonstrations_there_is_no_ptx_term(tmp_path: Path) -> None:
    assert "ptx_loss" not in trainer(tmp_path, max_steps=1, ptx_coeff=16.0).train().metrics[0]


def test_mistake_5_each_network_trains_and_the_reference_stays(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1)
    before, reference = parameters(run), [p.clone() for p in run.roles.reference.parameters()]
    run.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(run), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(reference, run.roles.reference.parameters(), strict=True))


def test_mistake_3_the_response_mask_ends_at_eos_in_the_loop(tmp_path: Path) -> None:
    """What stands after EOS may be anything: the run is the same."""

    class Littering(FakeRoles):
        def generate(self, inputs: Any, samples: int, sampling: Any) -> Any:
            responses = super().generate(inputs, samples, sampling)
            return replace(responses, ids=torch.where(responses.mask, responses.ids, BAD))

    runs = [trainer(tmp_path / str(i), roles=roles, max_steps=3) for i, roles in enumerate((FakeRoles(), Littering()))]
    rows = [run.train().metrics for run in runs]
    assert same(*runs)
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]
    assert all(row["response_length"] < 5 for row in rows[0])


def test_guidance_changes_nothing_and_says_where_the_costs_stand(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(n), max_steps=3, guidance_rollouts=n) for n in (0, 5)]
    for run in runs:
        run.train()
    assert same(*runs)
    guidance = json.loads((tmp_path / "5" / "threshold.json").read_text())
    assert guidance["rollouts"] == 30 and guidance["threshold"] == -0.2
    assert not (tmp_path / "0" / "threshold.json").exists()


def test_guidance_and_summary_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, max_steps=2, disable_tqdm=False).train()
    shown = capsys.readouterr().out
    for words in ("threshold d = -0.20", "step 1 of ", "multiplier", "first", "last"):
        assert words in shown
    assert re.search(r"step 1 of 2: reward .*  00:0\d left\n", shown)


@pytest.mark.parametrize("name", ["rewards", "costs"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_stop_the_run_and_name_the_step(tmp_path: Path, name: str, value: float) -> None:
    seen = []

    def scorer(prompts: Any, inputs: Any, responses: Any) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(1)
        scores = {"rewards": torch.zeros(len(prompts)), "costs": torch.zeros(len(prompts))}
        scores[name][0] = value if len(seen) == 3 else 0.0
        return scores["rewards"], scores["costs"]

    with pytest.raises(FloatingPointError, match=f"step 3: 1 of 6 {name} are not finite"):
        trainer(tmp_path, scorer=scorer, guidance_rollouts=0).train()
    latest = latest_checkpoint(tmp_path)
    assert latest is not None and latest.name == "checkpoint-2"


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path: Path) -> None:
    run = trainer(tmp_path, guidance_rollouts=0)
    before = parameters(run)
    run.roles.policy.head.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="step 1: the norm of the policy gradient is nan"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(run), strict=True))


def test_a_scorer_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards \(1,\) .* both must be \(6,\)"):
        trainer(tmp_path, scorer=lambda p, i, r: (torch.zeros(1), torch.zeros(6))).train()


def test_a_function_of_the_text_is_a_scorer() -> None:
    encoder = FakeRoles().encoder
    scorer = TextScorer(lambda prompt, text: (float(prompt.text), text.split().count(str(GOOD)) - 1.0), encoder.decode)
    responses = encoder.responses(["5 2 5", "8"])
    rewards, costs = scorer([PROMPTS[2], PROMPTS[5]], encoder.prompts(PROMPTS[:2]), responses)
    assert rewards.tolist() == [3.0, 2.0] and costs.tolist() == [1.0, -1.0]


@pytest.mark.parametrize("dual", [LogDual(0.1, 1.0, 5.0), AdditiveDual(0.1, 1.0, 5.0), AugmentedDual(), PIDDual()])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
        {"measure": HighConfidence(0.5)},
        {"measure": CVaR(0.8)},
        {"algorithm": CRPO(threshold=-0.3, window=16)},
        {"algorithm": P3O(threshold=-0.3, window=16), "measure": CVaR(0.8)},
    ],
    ids=str,
)
def test_mistake_6_a_run_in_two_parts_equals_the_run_in_one(tmp_path: Path, dual: Any, changes: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", dual=dual, max_steps=6, **changes)
    rows = whole.train().metrics
    trainer(tmp_path / "parts", dual=dual, max_steps=3, save_total_limit=None, **changes).train()
    torch.manual_seed(999)
    second = trainer(tmp_path / "parts", dual=dual, max_steps=6, roles=FakeRoles(seed=5), **changes)
    second.roles.reference = whole.roles.reference  # frozen, so it is the user's to bring again
    resumed = second.train(resume_from_checkpoint=tmp_path / "parts" / "checkpoint-3").metrics
    assert same(whole, second)
    assert [{**row, "seconds": 0} for row in resumed] == [{**row, "seconds": 0} for row in rows]


@pytest.mark.parametrize("algorithm", [PPOLag(threshold=-0.2, window=16, delay=2), RePO(margin=0.1, delay=2)])
def test_checkpoints_of_earlier_versions_resume(tmp_path: Path, algorithm: Any) -> None:
    """They held no constraint, no number of observations, and the mean as RePO's measure."""
    dual = AdditiveDual(0.3, 0.5, 5.0)
    rows = trainer(tmp_path / "whole", algorithm, dual, max_steps=4).train().metrics
    trainer(tmp_path / "parts", algorithm, dual, max_steps=2).train()
    file = tmp_path / "parts" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["observations"], state["settings"]["constraint"]
    state["settings"] |= {"measure": {"name": "Mean"}}
    state["settings"]["arguments"] |= {"multiplier_patience": 50}
    file.write_text(json.dumps(state))
    if algorithm.constraint(dual).measure == Mean():
        with pytest.raises(CheckpointError, match="measure.name: 'Mean' in the checkpoint, 'CVaR' now"):
            trainer(tmp_path / "parts", algorithm, dual, measure=CVaR(0.5), max_steps=4).load(file.parent)
    resumed = trainer(tmp_path / "parts", algorithm, dual, max_steps=4).train(resume_from_checkpoint=True).metrics
    assert [{**row, "seconds": 0} for row in resumed] == [{**row, "seconds": 0} for row in rows]


def test_a_finished_run_resumes_to_its_end_at_once(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=3)
    first.train()
    again = trainer(tmp_path, max_steps=3)
    assert len(again.train(resume_from_checkpoint=True).metrics) == 3
    assert same(first, again)


def test_resume_without_a_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / name, max_steps=2) for name in "ab"]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=True)
    assert same(*runs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.5}, "arguments.learning_rate: 0.01 in the checkpoint, 0.5 now"),
        ({"seed": 7}, "arguments.seed"),
        ({"algorithm": PPOLag(threshold=0.3, window=16)}, "algorithm.threshold: -0.2 in the checkpoint, 0.3 now"),
        ({"dual": LogDual(0.1, 1.0, 9.0)}, "dual.maximum"),
        ({"dual": AdditiveDual(0.1, 1.0, 5.0)}, "dual.name: 'LogDual' in the checkpoint, 'AdditiveDual' now"),
        ({"prompts": PROMPTS[::-1]}, "prompts.hash"),
        ({"demonstrations": DEMONSTRATIONS}, "demonstrations.number"),
    ],
)
def test_a_resume_with_changed_settings_names_them(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    trainer(tmp_path, max_steps=2).train()
    with pytest.raises(CheckpointError, match=named):
        trainer(tmp_path, **({"max_steps": 2} | change)).train(resume_from_checkpoint=True)


def test_saving_and_logging_may_change_on_resume(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    changes: dict[str, Any] = {"max_steps": 4, "save_steps": 1, "save_total_limit": 3, "logging_steps": 2}
    assert trainer(tmp_path, **changes).train(resume_from_checkpoint=True).steps == 4
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=4, save_total_limit=None).train()
    with pytest.raises(CheckpointError, match=r"holds checkpoint-4, newer than where this run starts \(step 0\)"):
        trainer(tmp_path, max_steps=4).train()
    with pytest.raises(CheckpointError, match=r"newer than where this run starts \(step 2\)"):
        trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_tensorboard_holds_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = trainer(tmp_path, max_steps=3, report_to=["tensorboard"]).train().metrics
    events = EventAccumulator(str(tmp_path / "runs" / "policy"))
    events.Reload()
    scalars = events.Scalars("cost")
    assert [event.step for event in scalars] == [1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx([row["cost"] for row in rows])


def test_a_tracker_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="comet_ml"):
        trainer(tmp_path, max_steps=1, report_to=["comet_ml"]).train()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_steps", 0), ("mini_batch_size", -1), ("temperature", 0.0), ("save_total_limit", 0), ("learning_rate", -1.0)],
)
def test_arguments_that_make_no_sense_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: {value}"):
        arguments("unused", **{name: value})


def test_mistake_7_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="learnig_rate"):
        arguments("unused", learnig_rate=0.1)


def test_repo_per_prompt_sees_whole_prompts_of_the_window(tmp_path: Path) -> None:
    """A window of 5 costs and groups of 2: the newest two prompts, whichever sample the window cuts."""
    run = trainer(tmp_path, RePO(form="per_prompt", window=5), AdditiveDual(1.0, 0.0, 50.0))
    multiplier, first = run.constraint.observe(torch.tensor([[1.0, 2.0]]))
    assert first == 1.5 and multiplier == 1.5
    run.constraint.observe(torch.tensor([[-1.0, 3.0]]))
    # known: 2, -1, 3, -8, 2: prompts of (-1, 3) and (-8, 2), means 1 and -3
    assert run.constraint.observe(torch.tensor([[-8.0, 2.0]]))[1] == 0.5
