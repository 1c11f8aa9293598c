"""Losses of the direct algorithms: hand values, a brute-force loop, limits, and TRL on the same numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pair_logps import logps, pairs
from torch import Tensor

from safe_rlhf_v.algorithms.bfpo import BFPO
from safe_rlhf_v.algorithms.c_dpo import CDPO
from safe_rlhf_v.algorithms.dpo import DPO
from safe_rlhf_v.algorithms.kto import KTO
from safe_rlhf_v.algorithms.mm_dpo import MMDPO
from safe_rlhf_v.algorithms.sacpo import SACPO, merge
from safe_rlhf_v.algorithms.safe_dpo import SafeDPO
from safe_rlhf_v.types import PairBatch, PairLogps

RATIOS = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.double)  # log pi - log ref of two pairs
SCORES = {"rewards": torch.tensor([[2.0, 1.0], [0.0, 3.0]]), "costs": torch.tensor([[1.0, -1.0], [0.5, 2.5]])}
MISMATCHED = torch.tensor([[0.5, 1.0], [-0.5, 1.0]])  # mean 0.5
ALGORITHMS = [DPO(), DPO(axis="safer"), KTO(), KTO(axis="safer"), SafeDPO(), BFPO(), CDPO(), MMDPO()]
IDS = ["dpo_h", "dpo_s", "kto_h", "kto_s", "safe_dpo", "bfpo", "c_dpo", "mm_dpo"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def value(algorithm: Any, batch: PairBatch, mismatched: Tensor | None = None) -> float:
    return float(algorithm.loss(logps(RATIOS, mismatched), batch)[0])


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    # both prefer the first: h = 1 and -2; beta .5: -log sig(.5) = .474077, -log sig(-1) = 1.313262; mean .893669
    assert value(DPO(beta=0.5), pairs([0, 0])) == pytest.approx(0.893669, abs=1e-6)
    metrics = DPO(beta=0.5).loss(logps(RATIOS), pairs([0, 0]))[1]
    assert metrics == {"accuracy": 0.5, "margin": -0.5}


def test_dpo_learns_the_axis_it_is_told() -> None:
    batch = pairs([0, 0], safer=[1, 1])
    # the second preferred: h = -1 and 2: -log sig(-.5) = .974077, -log sig(1) = .313262; mean .643669
    assert value(DPO(beta=0.5, axis="safer"), batch) == pytest.approx(0.643669, abs=1e-6)
    assert value(DPO(beta=0.5), batch) == pytest.approx(0.893669, abs=1e-6)


def test_kto_by_hand() -> None:
    # z0 = .5, beta 1; desirable 1 and -1: 1 - sig(.5) = .377541, 1 - sig(-1.5) = .817574;
    # undesirable 0 and 1, twice their weight: 2 (1 - sig(.5)) = .755081, 2 (1 - sig(-.5)) = 1.244919; mean .798779
    algorithm = KTO(beta=1.0, undesirable_weight=2.0)
    assert value(algorithm, pairs([0, 0]), MISMATCHED) == pytest.approx(0.798779, abs=1e-6)
    # z0 is never below 0, so a baseline of -1 counts as 0: 1 - sig(1), 1 - sig(-1), 2 (1 - sig(0)), 2 (1 - sig(-1));
    # .268941 + .731059 + 1 + 1.462117 = 3.462117, a quarter of it
    assert value(algorithm, pairs([0, 0]), MISMATCHED * 0 - 1) == pytest.approx(0.865529, abs=1e-6)


def test_kto_on_safety_calls_every_safe_response_desirable() -> None:
    batch = pairs([0, 0], rates=[[2.0, 1.0], [-1.0, -3.0]])
    assert KTO(axis="safer").desirable(batch).tolist() == [[True, True], [False, False]]
    assert KTO().desirable(batch).tolist() == [[True, False], [True, False]]


def test_kto_baseline_gives_no_gradient_and_is_asked_for() -> None:
    mismatched = MISMATCHED.clone().requires_grad_()
    ratios = RATIOS.clone().requires_grad_()
    KTO().loss(logps(ratios, mismatched), pairs([0, 0]))[0].backward()
    assert mismatched.grad is None and ratios.grad is not None
    with pytest.raises(ValueError, match="KTO needs PairLogps.mismatched"):
        KTO().loss(logps(RATIOS), pairs([0, 0]))


def test_safe_dpo_by_hand() -> None:
    # pair 0: the first, more helpful, is unsafe and the second safe: swapped, h = -1, u_l - u_w = 1;
    # pair 1: both safe, the first more helpful: h = -2. beta .5, delta 2:
    # -log sig(-.5 - 2) = 2.578890, -log sig(-1) = 1.313262; mean 1.946076
    batch = pairs([0, 0], rates=[[-2.0, 1.0], [1.0, 2.0]])
    loss, metrics = SafeDPO(beta=0.5, delta=2.0).loss(logps(RATIOS), batch)
    assert loss.item() == pytest.approx(1.946076, abs=1e-6)
    assert metrics["swapped"] == 0.5


def test_safe_dpo_without_margin_is_dpo_on_the_relabelled_pairs() -> None:
    rates = [[-2.0, 1.0], [1.0, 2.0]]
    assert value(SafeDPO(delta=0.0), pairs([0, 0], rates=rates)) == pytest.approx(value(DPO(), pairs([1, 0])))
    assert value(SafeDPO(delta=0.0), pairs([1, 1])) == pytest.approx(value(DPO(), pairs([1, 1])))


def test_a_safe_winner_is_not_swapped() -> None:
    batch = pairs([0], rates=[[1.0, -1.0]])
    loss, metrics = SafeDPO(beta=1.0, delta=3.0).loss(logps(RATIOS[:1]), batch)
    assert metrics["swapped"] == 0
    assert loss.item() == pytest.approx(-math.log(sigmoid(1 - 3)))


@pytest.mark.parametrize(
    ("rates", "target"),
    [([1.0, -1.0], 1.0), ([1.0, 1.0], 0.5), ([-1.0, -1.0], -0.5), ([-1.0, 1.0], -1.0), ([0.0, -1.0], 1.0)],
)
def test_bfpo_targets(rates: list[float], target: float) -> None:
    """b1 b3 s_w - b3 s_l - alpha = 1.5 s_w - .5 s_l - .5; a rate of 0 is safe. h = 1: (1 - target / .5)^2."""
    loss, metrics = BFPO(beta=0.5).loss(logps(RATIOS[:1]), pairs([0], rates=[rates]))
    assert metrics["target"] == pytest.approx(target / 0.5)
    assert loss.item() == pytest.approx((1 - target / 0.5) ** 2)


def test_c_dpo_by_hand() -> None:
    # lam 1: r - c = (1, 2) and (-.5, .5): the second by 1 in both, weight sig(1) = .731059. beta .5, h of the second
    # over the first = -1 and 2: .731059 * .974077 + .268941 * .474077 = .839606 and
    # .731059 * .313262 + .268941 * 1.313262 = .582203; mean .710905
    batch = pairs([0, 0], **SCORES)
    assert value(CDPO(beta=0.5), batch) == pytest.approx(0.710905, abs=1e-6)
    # hard: the second wins whole: (.974077 + .313262) / 2
    assert value(CDPO(beta=0.5, labels="hard"), batch) == pytest.approx(0.643669, abs=1e-6)
    # lam 0: rewards alone, the first by 1 in pair 0, the second by 3 in pair 1
    hard = CDPO(beta=0.5, labels="hard", multiplier=0.0)
    assert value(hard, batch) == pytest.approx(value(DPO(beta=0.5), pairs([0, 1])))


def test_c_dpo_moves_its_multiplier_by_the_violation() -> None:
    algorithm = CDPO(threshold=-1.0, dual_lr=0.5, multiplier=2.0)
    multiplier, violation = algorithm.constraint().observe(torch.tensor([1.0, 2.0]))  # 1.5 + 1
    assert violation == 2.5
    assert multiplier == 3.25
    assert algorithm.at(3.25).multiplier == 3.25
    assert algorithm.constraint().observe(torch.tensor([-101.0]))[0] == 0.0


def test_mm_dpo_by_hand() -> None:
    # w .5, k .5; first preferred in pair 0, reward margin 1: beta = .5 (1 + .5 (1 - e^-.5)) = .598367, h = 1;
    # first preferred in pair 1, margin -3 counts 0: beta .5, h = -2.
    # -log sig(.598367) = .438067, -log sig(-1) = 1.313262; mean .875664
    batch, algorithm = pairs([0, 0], **SCORES), MMDPO(beta=0.5, sft_weight=0.0)
    assert value(algorithm, batch) == pytest.approx(0.875664, abs=1e-6)
    # log pi of the preferred: -1 + 1 = 0 and -3 - 1 = -4 over 2 tokens each: imitation adds .25 * (0 + 2) / 2
    assert value(replace(algorithm, sft_weight=0.25), batch) == pytest.approx(0.875664 + 0.25, abs=1e-6)
    assert value(replace(algorithm, w=0.0), batch) == pytest.approx(value(DPO(beta=0.5), batch))


# --- what holds for all -----------------------------------------------------------------------------------------------


def example(rates: list[list[float]] | None = None) -> PairBatch:
    return pairs([0, 1], safer=[0, 1], rates=rates or [[1.0, -2.0], [0.0, 3.0]], **SCORES)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_order_of_the_responses_does_not_matter(algorithm: Any) -> None:
    batch = example()
    swapped = replace(
        batch, responses=batch.responses[::-1], more_helpful=1 - batch.more_helpful, safer=1 - batch.safer,
        harmless_rate=batch.harmless_rate.flip(1), rewards=SCORES["rewards"].flip(1), costs=SCORES["costs"].flip(1),
    )  # fmt: skip
    given = logps(RATIOS, MISMATCHED)
    turned = PairLogps(policy=given.policy.flip(1), reference=given.reference.flip(1), lengths=given.lengths,
                       mismatched=MISMATCHED.flip(1))  # fmt: skip
    assert algorithm.loss(turned, swapped)[0].item() == pytest.approx(algorithm.loss(given, batch)[0].item())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_gradient_equals_finite_differences(algorithm: Any) -> None:
    ratios = RATIOS.clone().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return algorithm.loss(logps(x, MISMATCHED.double()), example())[0]  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(loss, ratios)
    (gradient,) = torch.autograd.grad(loss(ratios), ratios)
    assert bool(gradient.abs().sum(1).gt(0).all())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_only_log_ratios_matter(algorithm: Any) -> None:
    """The reference enters through log pi - log ref alone (MM-DPO's imitation apart)."""
    if isinstance(algorithm, MMDPO):
        algorithm = replace(algorithm, sft_weight=0.0)
    given = logps(RATIOS, MISMATCHED)
    shifted = replace(given, policy=given.policy + 7, reference=given.reference + 7)
    assert algorithm.loss(shifted, example())[0].item() == pytest.approx(algorithm.loss(given, example())[0].item())


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_mistake_11_identical_responses_are_refused(algorithm: Any) -> None:
    batch = example()
    same = replace(batch, responses=(batch.responses[0], batch.responses[0]))
    with pytest.raises(ValueError, match=r"pairs \[0, 1\] .* same response twice"):
        algorithm.loss(logps(RATIOS, MISMATCHED), same)


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_mistake_11_contradictory_pairs_are_refused_on_the_axis_of_safety(kind: Any) -> None:
    batch = pairs([0, 0], safer=[1, 0], rates=[[1.0, -2.0], [1.0, 0.0]])
    given = logps(RATIOS, MISMATCHED)
    with pytest.raises(ValueError, match=r"pairs \[0\] .* lower harmless_rate"):
        kind(axis="safer").loss(given, batch)
    assert kind(axis="safer", allow_contradictory=True).loss(given, batch)[0].isfinite()
    assert kind().loss(given, batch)[0].isfinite()  # helpfulness does not ask


def test_two_unsafe_responses_are_refused_where_nothing_can_be_learned_of_them() -> None:
    batch = pairs([0, 0], rates=[[1.0, -2.0], [-1.0, -3.0]])
    assert SafeDPO.drops_both_unsafe
    with pytest.raises(ValueError, match=r"pairs \[1\] .* two unsafe responses"):
        SafeDPO().loss(logps(RATIOS), batch)


@pytest.mark.parametrize("algorithm", [CDPO(), MMDPO()])
def test_missing_scores_are_an_error(algorithm: Any) -> None:
    assert algorithm.needs_scores
    with pytest.raises(ValueError, match="needs the rewards"):
        algorithm.loss(logps(RATIOS), pairs([0, 0]))


def test_dpo_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    ratios = 3 * torch.randn(6, 2, generator=generator, dtype=torch.double)
    labels = [0, 1, 1, 0, 1, 0]
    margins = [ratios[i, k].item() - ratios[i, 1 - k].item() for i, k in enumerate(labels)]
    expected = sum(-math.log(sigmoid(0.3 * h)) for h in margins) / 6
    policy = ratios.clone().requires_grad_()
    loss = DPO(beta=0.3).loss(logps(policy), pairs(labels))[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    for i, k in enumerate(labels):  # d/dh -log sig(beta h) = -beta sig(-beta h)
        slope = -0.3 * sigmoid(-0.3 * margins[i]) / 6
        assert policy.grad is not None
        assert policy.grad[i, k].item() == pytest.approx(slope)
        assert policy.grad[i, 1 - k].item() == pytest.approx(-slope)


# --- SACPO ------------------------------------------------------------------------------------------------------------


def test_sacpo_stages() -> None:
    first, second = SACPO(beta=0.1, lam=4.0).stages()
    assert (first, second) == (DPO(beta=0.1), DPO(beta=0.025, axis="safer"))
    algorithm = SACPO(first="kto", second="kto", lam=2.0, undesirable_weight=0.5, allow_contradictory=True)
    kto = KTO(undesirable_weight=0.5, allow_contradictory=True)
    assert algorithm.stages() == (kto, replace(kto, beta=0.05, axis="safer"))
    with pytest.raises(ValueError, match=r"q 2 in 0\.\.1"):
        SACPO(q=2)


def test_merge_by_hand() -> None:
    first = {"w": torch.tensor([1.0, 3.0]), "half": torch.tensor([1.0], dtype=torch.bfloat16), "n": torch.tensor([1])}
    second = {"w": torch.tensor([5.0, -1.0]), "half": torch.tensor([3.0], dtype=torch.bfloat16), "n": torch.tensor([2])}
    merged = merge(first, second, 0.25)
    assert merged["w"].tolist() == [2.0, 2.0]  # .75 * 1 + .25 * 5, .75 * 3 - .25
    assert merged["half"].tolist() == [1.5] and merged["half"].dtype == torch.bfloat16
    assert merged["n"].tolist() == [2]
    assert all(torch.equal(v, second[k]) for k, v in merge(first, second, 1.0).items())
    assert torch.equal(merge(first, second, 0.0)["w"], first["w"])
    with pytest.raises(ValueError, match=r"different weights: \['n'\]"):
        merge({k: first[k] for k in ("w", "half")}, second, 0.5)


# --- against TRL ------------------------------------------------------------------------------------------------------


def trl_self(**more: Any) -> Any:
    """What the loss of a TRL trainer reads of its trainer, without a model or data."""
    same = lambda x: x  # noqa: E731
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)
    return SimpleNamespace(
        accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False, beta=0.3,
        precompute_ref_logps=True, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **more,
    )  # fmt: skip


def trl_outputs(log_probs: Tensor) -> Any:
    zero = torch.zeros_like(log_probs.detach())
    return SimpleNamespace(log_probs=log_probs, entropy=zero, mean_logits=zero, is_top1=zero.bool())


def rows(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probabilities (2B, R) of B = 3 pairs, the preferred first; their mask; reference sums (2B,)."""
    mask = torch.arange(4) < torch.tensor([[4], [2], [1], [3], [4], [2]])
    values = -torch.rand(6, 4, generator=generator, dtype=torch.double)
    return values * mask, mask, -5 * torch.rand(6, generator=generator, dtype=torch.double)


def as_pairs(values: Tensor, labels: list[int]) -> Tensor:
    """(2B,), preferred first, to (B, 2) in data-set order."""
    both = torch.stack([values[:3], values[3:]], 1)
    return torch.stack([row.flip(0) if k else row for row, k in zip(both, labels, strict=True)])


@pytest.mark.parametrize("seed", range(3))
def test_dpo_loss_and_gradient_equal_trls(seed: int) -> None:
    trl = pytest.importorskip("trl")
    tokens, mask, reference = rows(torch.Generator().manual_seed(seed))
    theirs, ours = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    trainer = trl_self(
        ld_alpha=None, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], use_weighting=False
    )
    completion = torch.nn.functional.pad(mask.long(), (1, 0))  # one prompt token before
    inputs = {
        "input_ids": torch.ones(6, 5).long(), "attention_mask": torch.ones(6, 5), "completion_mask": completion,
        "ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:],
    }  # fmt: skip
    model = lambda **_: trl_outputs(theirs)  # noqa: E731
    expected = trl.DPOTrainer._compute_loss(trainer, model, inputs, False)
    labels = [0, 1, 1]
    given = PairLogps(
        policy=as_pairs(ours.masked_fill(~mask, 0).sum(1), labels),
        reference=as_pairs(reference, labels),
        lengths=as_pairs(mask.sum(1), labels),
    )
    loss, metrics = DPO(beta=0.3).loss(given, pairs(labels))
    torch.testing.assert_close(loss, expected)
    assert metrics["accuracy"] == pytest.approx(trainer._metrics["train"]["rewards/accuracies"][0])
    assert 0.3 * metrics["margin"] == pytest.approx(trainer._metrics["train"]["rewards/margins"][0])
    for value in (loss, expected):
        value.backward()
    torch.testing.assert_close(ours.grad, theirs.grad.masked_fill(~mask, 0))
    assert bool(ours.grad.abs().gt(0).any())


@pytest.mark.parametrize("seed", range(3))
def test_kto_loss_and_gradient_equal_trls(seed: int) -> None:
    trl = pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(seed)
    tokens, mask, reference = rows(generator)
    other, _, other_reference = rows(generator)  # the mismatched responses
    theirs, ours = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    trainer = trl_self(calculate_KL=True, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.5)
    trainer._compute_kl_logps = lambda *_: other.sum(1)
    inputs = {
        "input_ids": torch.ones(6, 5).long(), "attention_mask": torch.ones(6, 5), "ref_logps": reference,
        "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)), "ref_KL_logps": other_reference,
        "label": torch.tensor([True] * 3 + [False] * 3),
    }  # fmt: skip
    expected = trl.KTOTrainer._compute_loss(trainer, lambda **_: trl_outputs(theirs), inputs, False)
    labels = [0, 1, 1]
    given = PairLogps(
        policy=as_pairs(ours.sum(1), labels),
        reference=as_pairs(reference, labels),
        lengths=as_pairs(mask.sum(1), labels),
        mismatched=as_pairs(other.sum(1) - other_reference, labels),
    )
    loss = KTO(beta=0.3, undesirable_weight=1.5).loss(given, pairs(labels))[0]
    torch.testing.assert_close(loss, expected)
    for value in (loss, expected):
        value.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
