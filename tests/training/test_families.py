"""Every family goes the whole way at tiny size: SFT, reward, cost, guard, one update of the policy, saved and reloaded.

The data mixes one picture, none, two and one in a batch. Each stage takes a single step; what is asked is that it moves
what it should, and that the folder it leaves gives the very numbers that were measured.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from comparisons import comparison
from more_families import ALL, base, known
from rounding import close
from sections import of
from tiny_models import SAME, exact_states, prompts, response_hidden
from transformers import AutoModelForImageTextToText

from beavertails_v.schema import Comparison, LabelledResponse
from guard.classifier import Guard
from guard.train import GuardOptions, train_guard
from safe_rlhf_v.algorithms.group_lag import GroupLag
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.config import Settings, load_settings
from safe_rlhf_v.duals import LogDual
from safe_rlhf_v.online.arguments import OnlineArguments
from safe_rlhf_v.online.loop import OnlineTrainer
from safe_rlhf_v.roles.protocol import AdapterRoles
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.training.encode import PairCollator, interleaved
from safe_rlhf_v.training.supervised import train_preference_model, train_sft
from safe_rlhf_v.vlm.adapters import LoraSettings, language_prefix
from safe_rlhf_v.vlm.backbone import load_backbone, output_head
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder, load_processor

every_family = pytest.mark.parametrize("family", ALL)


def settings(stage: str) -> Settings:
    quick = ("max_steps=1", "learning_rate=1e-2", "warmup_steps=0")
    made = load_settings(None, [*(f"{stage}.{x}" for x in quick), "model.lora.r=2"])
    made.evaluation.bootstrap = 100
    return made


def pairs() -> list[Comparison]:
    """Four pairs with one picture, none, two and one; benign and harmful prompts."""
    rows = [comparison(i) for i in range(4)]
    asked = [replace(p, category=row.prompt.category) for p, row in zip(prompts(), rows, strict=True)]
    return [replace(row, prompt=prompt) for row, prompt in zip(rows, asked, strict=True)]


@cache
def stage(family: str, kind: str) -> tuple[Path, dict[str, Any]]:
    """Folder and figures of a stage, run once a session."""
    folder = Path(mkdtemp()) / kind
    if kind == "sft":
        return folder, train_sft(pairs(), pairs(), base(family), folder, *of(settings("sft"), "sft"))
    start = stage(family, "sft")[0]
    return folder, train_preference_model(kind, pairs(), pairs(), start, folder, *of(settings(kind), kind))  # type: ignore[arg-type]


@pytest.mark.capability("SFT")
@every_family
def test_sft(family: str) -> None:
    """The folder is a whole model of transformers, and gives the loss that was measured; pictures' weights stay."""
    folder, measured = stage(family, "sft")
    model, before = AutoModelForImageTextToText.from_pretrained(folder).eval(), known(family)[0]
    encoder = Encoder(load_processor(folder), config=model.config)
    inputs = encoder.prompts([p.prompt for p in pairs()])
    responses = encoder.responses([p.responses[p.more_helpful].text for p in pairs()])

    def loss(model: Any) -> float:
        hidden = response_hidden(model, inputs, responses)
        logps = token_logps(hidden, output_head(model), responses.ids, suppress=encoder.placeholder_ids)
        rows = logps.masked_fill(~responses.mask, 0.0).sum(1) / responses.mask.sum(1)
        return -rows.mean().item()

    assert loss(model) == pytest.approx(measured["evaluation"]["loss"], rel=1e-4)
    assert loss(model) < loss(before)
    language, theirs = language_prefix(model), dict(before.named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, theirs[name])}
    assert moved and all(name.startswith((language, "lm_head")) for name in moved)


@every_family
@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.capability(k)) for k in ("reward", "cost")])
def test_preference_models(family: str, kind: str) -> None:
    """The reloaded model gives the scores that were measured, and a pair alone what it gives in the batch (of other
    shapes, whose roundings these models enlarge: in float64, but for the head)."""
    folder, _ = stage(family, kind)
    model = HeadedModel.from_pretrained(folder)
    encoder = Encoder(load_processor(folder), config=model.backbone.config)
    lines = (folder / "evaluation_scores.jsonl").read_text().splitlines()
    measured = torch.tensor([json.loads(line)["scores"] for line in lines])

    @torch.no_grad()
    def scores(rows: list[Comparison]) -> torch.Tensor:
        batch = PairCollator(encoder)(rows)["pairs"]
        return model(batch.prompts.repeat(2), interleaved(batch.responses))["score"].view(-1, 2)

    close(scores(pairs()), measured)
    model.backbone.double()
    close(torch.cat([scores([row]) for row in pairs()]), scores(pairs()))
    assert measured.unique().numel() == 8
    assert all(p.any() for name, p in model.named_parameters() if ".lora_B." in name), "the step moved every adapter"


@pytest.mark.capability("guard")
@every_family
def test_guard(family: str, tmp_path: Path) -> None:
    """Queries and responses, judged by the reloaded guard: together as one by one, in float64 for the same reason."""
    rows = [LabelledResponse(prompt=row.prompt, response=r) for row in pairs() for r in row.responses]
    benign = [replace(p, text=f"{p.text} please", benign=True) for p in prompts()]
    options = GuardOptions(calibration_share=0)
    measured = train_guard(
        rows, rows, base(family), tmp_path, *of(settings("guard"), "guard"), benign=benign, options=options
    )
    assert measured["kinds"] == ["query", "response"] and measured["left_out"] == 0
    guard = Guard.from_pretrained(tmp_path)
    guard.model.backbone.double()
    asked = [row.prompt for row in rows] + [p.prompt for p in pairs()]
    replies = [row.response.text for row in rows] + [None] * 4
    together = guard.judge(asked, replies)
    for prompt, reply, verdict in zip(asked, replies, together, strict=True):
        alone = guard.judge([prompt], [reply])[0]
        assert alone.unsafe_probability == pytest.approx(verdict.unsafe_probability, abs=1e-5)
        assert alone.severity == verdict.severity


@every_family
@pytest.mark.parametrize(
    "critics",
    [
        pytest.param(True, marks=pytest.mark.capability("PPO-Lag")),
        pytest.param(False, marks=pytest.mark.capability("no critics")),
    ],
)
def test_one_update_of_the_policy(family: str, critics: bool, tmp_path: Path) -> None:
    """PPO-Lagrangian with two critics, or the group form without: policy and critics move, the reference does not, and
    the saved adapter is the policy."""
    start, reward, cost = (stage(family, kind)[0] for kind in ("sft", "reward", "cost"))
    roles = AdapterRoles.from_pretrained(start, reward, cost, critics, lora=LoraSettings(r=2))
    inputs = roles.encoder.prompts(prompts())
    responses = roles.encoder.responses(["I cannot help with that.", "a", "first take the key", ""])
    before = {name: p.clone() for name, p in roles.state_dict().items()}
    reference = roles.logps(inputs, responses, "reference")
    arguments = OnlineArguments(
        output_dir=tmp_path, max_steps=1, num_generations=2, mini_batch_size=8, max_new_tokens=4, learning_rate=1e-2,
        critic_learning_rate=1e-2, ptx_coeff=0.0, guidance_rollouts=0, disable_tqdm=True,
    )  # fmt: skip
    algorithm = PPOLag(window=0, delay=0) if critics else GroupLag()
    # not 1: of two samples, standardised reward and cost are +-1 each, and would cancel wherever they agree in sign
    constraint = algorithm.constraint(LogDual(0.1, 0.5, 5.0))
    result = OnlineTrainer(roles, algorithm, constraint, prompts(), arguments).train()
    assert result.metrics[0]["clip_fraction"] == 0, "log-probabilities of the rollout are those of the first update"
    changed = {name.split(".")[0] for name, p in roles.state_dict().items() if not torch.equal(p, before[name])}
    assert changed == ({"policy", "reward_critic", "cost_critic"} if critics else {"policy"})
    assert torch.equal(roles.logps(inputs, responses, "reference"), reference)
    assert (roles.logps(inputs, responses) - reference)[responses.mask].abs().max() > 1e-3
    saved = load_backbone(result.policy_dir, dtype="float64")
    states = [exact_states(model, inputs, responses) for model in (saved, roles._as("policy"))]
    torch.testing.assert_close(*states, **SAME)
