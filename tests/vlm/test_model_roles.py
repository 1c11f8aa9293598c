"""Six roles on one backbone do exactly what six models do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from more_families import ALL, base
from tiny_models import FAMILIES, prompts, response_hidden, save, tokenizer
from torch import nn

from safe_rlhf_v.generation import Sampling
from safe_rlhf_v.roles.protocol import AdapterRoles, Roles, SeparateRoles
from safe_rlhf_v.tensors import pool_last, token_logps
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import LoraSettings, hidden_states, load_backbone, output_head
from safe_rlhf_v.vlm.heads import HeadedModel

families = pytest.mark.parametrize("family", FAMILIES)
LORA = LoraSettings(r=2)
TEXTS = ["I cannot help with that.", "a", "first take the key, then turn it.", ""]
SCALE = 0.02  # of the adapters: so small that merging them rounds to below 1e-6


@cache
def folders(family: str) -> dict[str, Path]:
    """Base, reward and cost adapters on it, a policy adapter, and full copies of all three with the adapters merged."""
    root = Path(mkdtemp())
    found = {"base": base(family)}
    for seed, role in enumerate(("reward", "cost")):
        torch.manual_seed(seed + 1)
        model = HeadedModel(load_backbone(found["base"]), {"score": 1}, LORA)
        shake(p for n, p in model.named_parameters() if "lora_B" in n)
        found[role] = root / role
        model.save_pretrained(found[role])
        full = HeadedModel(load_backbone(found[role]), {"score": 1})
        full.heads.load_state_dict(model.heads.state_dict())
        found[f"full {role}"] = root / f"full {role}"
        full.save_pretrained(found[f"full {role}"])
    return found


def shake(parameters: Iterator[nn.Parameter]) -> None:
    for parameter in parameters:
        nn.init.normal_(parameter, std=SCALE)


def adapter_roles(family: str, **options: object) -> AdapterRoles:
    """Roles whose policy and critics have moved away from where they start."""
    found = folders(family)
    torch.manual_seed(7)
    roles = AdapterRoles.from_pretrained(found["base"], found["reward"], found["cost"], lora=LORA, **options)
    groups = (roles.policy_parameters(), roles.critic_parameters("reward"), roles.critic_parameters("cost"))
    for group in groups:
        shake(p for p in group if p.shape[-1] == LORA.r)  # the lora_B
    return roles


def batch(roles: Roles) -> tuple[Inputs, Responses]:
    return roles.encoder.prompts(prompts()), roles.encoder.responses(TEXTS)


def close(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor | None = None, atol: float = 5e-6) -> None:
    torch.testing.assert_close(a if mask is None else a[mask], b if mask is None else b[mask], rtol=1e-6, atol=atol)


@pytest.mark.capability("one backbone = six")
@pytest.mark.parametrize("family", ALL)
def test_adapter_roles_equal_separate_roles(family: str, tmp_path: Path) -> None:
    """Adapters merged into full copies: same log-probabilities, scores, values and, with one seed, same tokens."""
    ours, found = adapter_roles(family), folders(family)
    ours.save_policy(tmp_path / "adapter")
    full = SeparateRoles.from_pretrained(tmp_path / "adapter", found["full reward"], found["full cost"])
    full.models["reference"] = load_backbone(found["base"])
    merge_critics(ours, full, tmp_path)
    inputs, responses = batch(ours)
    for role in ("policy", "reference"):
        close(ours.logps(inputs, responses, role), full.logps(inputs, responses, role), responses.mask)
    for mine, other in zip(ours.scores(inputs, responses), full.scores(inputs, responses), strict=True):
        close(mine, other)
    for which in ("reward", "cost"):
        close(ours.values(inputs, responses, which), full.values(inputs, responses, which), responses.mask)
    drawn = []
    for roles in (ours, full):
        torch.manual_seed(3)
        drawn.append(roles.generate(inputs, 2, Sampling(max_new_tokens=5)))
    assert torch.equal(drawn[0].ids, drawn[1].ids) and torch.equal(drawn[0].mask, drawn[1].mask)


def merge_critics(ours: AdapterRoles, full: SeparateRoles, tmp_path: Path) -> None:
    from safe_rlhf_v.vlm.heads import save_adapter

    for role in ("reward_critic", "cost_critic"):
        save_adapter(ours.backbone, role, tmp_path / role)
        full.models[role] = load_backbone(tmp_path / role)
        full.heads[role] = ours.heads[role]


@families
def test_roles_are_the_models_they_were_loaded_from(family: str) -> None:
    ours, found = adapter_roles(family), folders(family)
    inputs, responses = batch(ours)
    for which, score in zip(("reward", "cost"), ours.scores(inputs, responses), strict=True):
        expected = HeadedModel.from_pretrained(found[which])(inputs, responses)["score"][:, 0]
        assert torch.equal(score, expected)
    reference = load_backbone(found["base"])
    suppress = ours.encoder.placeholder_ids
    hidden = response_hidden(reference, inputs, responses)
    expected = token_logps(hidden, output_head(reference), responses.ids, suppress=suppress, mask=responses.mask)
    assert torch.equal(ours.logps(inputs, responses, "reference"), expected)
    fresh = AdapterRoles.from_pretrained(found["base"], found["reward"], found["cost"], lora=LORA)
    assert torch.equal(fresh.logps(inputs, responses), expected), "the policy starts as the reference"


@pytest.mark.parametrize("family", ["llava"])
def test_mistake_5_critics_start_as_the_reward_and_cost_model(family: str) -> None:
    """Their value of the last token's predecessor state is the model's own head on that state; not the policy's."""
    found = folders(family)
    for roles in (
        AdapterRoles.from_pretrained(found["base"], found["reward"], found["cost"], lora=LORA),
        SeparateRoles.from_pretrained(found["base"], found["full reward"], found["full cost"]),
    ):
        inputs, responses = batch(roles)
        for which in ("reward", "cost"):
            model = HeadedModel.from_pretrained(found[which])
            expected = model.heads["score"](response_hidden(model.backbone, inputs, responses))[..., 0]
            close(roles.values(inputs, responses, which), expected, responses.mask)


def test_values_stand_on_the_state_that_predicts_the_token() -> None:
    roles = adapter_roles("llava")
    inputs, responses = batch(roles)
    values = roles.values(inputs, responses, "cost")
    hidden = hidden_states(roles._as("cost_critic"), inputs)
    first = roles.heads["cost_critic"](pool_last(hidden, inputs.attention_mask))[:, 0]
    close(values[:, 0], first)


def test_mistake_5_another_vocabulary_is_refused(tmp_path: Path) -> None:
    found = folders("llava")
    model, processor = FAMILIES["llava"]()
    reward = HeadedModel(model, {"reward": 1})
    processor.tokenizer = tokenizer(["<image>", "<more>"])
    reward.save_pretrained(tmp_path, processor)
    with pytest.raises(ValueError, match="another vocabulary"):
        SeparateRoles.from_pretrained(found["base"], tmp_path, found["full cost"])


@families
def test_each_loss_moves_its_own_role_only(family: str) -> None:
    found = folders(family)
    separate = SeparateRoles.from_pretrained(found["base"], found["full reward"], found["full cost"])
    for roles in (adapter_roles(family), separate):
        inputs, responses = batch(roles)
        roles.scores(inputs, responses)
        roles.generate(inputs, 1, Sampling(max_new_tokens=2))
        for role in ("policy", "reward_critic", "cost_critic"):
            which = role.removesuffix("_critic")
            output = roles.logps(inputs, responses) if role == "policy" else roles.values(inputs, responses, which)
            output[responses.mask].sum().backward()
            for other, parameters in roles._trainable().items():
                touched = [n for n, p in parameters.items() if p.grad is not None and p.grad.any()]
                assert bool(touched) == (other == role), (role, other)
                for p in parameters.values():
                    p.grad = None
        assert roles.logps(inputs, responses, "reference").requires_grad is False
        assert not any(score.requires_grad for score in roles.scores(inputs, responses))


@families
def test_features_change_nothing_and_reach_every_role(family: str) -> None:
    found = folders(family)
    separate = SeparateRoles.from_pretrained(found["base"], found["full reward"], found["full cost"])
    for roles in (adapter_roles(family), separate):
        inputs, responses = batch(roles)
        featured = roles.prepare(inputs)
        assert featured.features is not None
        for role in ("policy", "reference"):
            close(roles.logps(featured, responses, role), roles.logps(inputs, responses, role), responses.mask, 1e-5)
        for mine, other in zip(roles.scores(featured, responses), roles.scores(inputs, responses), strict=True):
            close(mine, other, atol=1e-5)


def test_separate_roles_hold_the_vision_tower_once() -> None:
    found = folders("llava")
    roles = SeparateRoles.from_pretrained(found["base"], found["full reward"], found["full cost"])
    towers = {id(p) for m in roles.models.values() for p in m.model.vision_tower.parameters()}
    assert len(towers) == len(list(roles.models["policy"].model.vision_tower.parameters()))
    assert not any(p.requires_grad for p in roles.models["policy"].model.vision_tower.parameters())
    words = {id(m.get_input_embeddings().weight) for m in roles.models.values()}
    assert len(words) == 6, "language models are their own"


def test_another_tower_is_not_shared_and_pictures_are_encoded_by_each(tmp_path: Path) -> None:
    found = folders("llava")
    other = HeadedModel(FAMILIES["llava"](seed=5)[0], {"reward": 1})
    other.save_pretrained(tmp_path, FAMILIES["llava"]()[1])
    roles = SeparateRoles.from_pretrained(found["base"], tmp_path, found["full cost"])
    inputs, responses = batch(roles)
    assert roles.prepare(inputs).features is None
    expected = HeadedModel.from_pretrained(tmp_path)(inputs, responses)["reward"][:, 0]
    assert torch.equal(roles.scores(inputs, responses)[0], expected)


@pytest.mark.parametrize("family", ["llava"])
def test_the_policy_is_saved_where_load_backbone_finds_it(family: str, tmp_path: Path) -> None:
    found = folders(family)
    separate = SeparateRoles.from_pretrained(found["base"], found["full reward"], found["full cost"])
    for name, roles in (("adapter", adapter_roles(family)), ("full", separate)):
        inputs, responses = batch(roles)
        roles.save_policy(tmp_path / name)
        model = load_backbone(tmp_path / name)
        hidden = response_hidden(model, inputs, responses)
        logps = token_logps(hidden, output_head(model), responses.ids, suppress=roles.encoder.placeholder_ids)
        close(roles.logps(inputs, responses), logps, responses.mask)


def test_state_holds_what_trains_and_nothing_else_and_is_strict() -> None:
    roles = adapter_roles("llava")
    inputs, responses = batch(roles)
    state = {name: value.clone() for name, value in roles.state_dict().items()}
    assert {name.split(".")[0] for name in state} == {"policy", "reward_critic", "cost_critic"}
    trainable = [p for p in roles.backbone.parameters() if p.requires_grad]
    assert len(state) == len(trainable) + 2, "two heads beside the adapters"
    other = AdapterRoles.from_pretrained(*(folders("llava")[k] for k in ("base", "reward", "cost")), lora=LORA)
    assert not torch.equal(other.logps(inputs, responses), roles.logps(inputs, responses))
    other.load_state_dict(state)
    assert torch.equal(other.logps(inputs, responses), roles.logps(inputs, responses))
    for which in ("reward", "cost"):
        assert torch.equal(other.values(inputs, responses, which), roles.values(inputs, responses, which))
    name = next(iter(state))
    with pytest.raises(ValueError, match="missing"):
        other.load_state_dict({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="unexpected"):
        other.load_state_dict(state | {"more": state[name]})
    with pytest.raises(ValueError, match="shape"):
        other.load_state_dict(state | {name: state[name][:1]})


def test_gradient_checkpointing_recomputes_under_the_right_adapter() -> None:
    """Between a forward and its backward other roles run; recomputing under theirs would give wrong gradients."""
    gradients = []
    for checkpointing in (False, True):
        roles = adapter_roles("llava", gradient_checkpointing=checkpointing)
        inputs, responses = batch(roles)
        loss = roles.logps(inputs, responses)[responses.mask].sum()
        loss = loss + roles.values(inputs, responses, "cost")[responses.mask].sum()
        roles.scores(inputs, responses)
        loss.backward()
        gradients.append({n: p.grad for n, p in roles._named() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_turns_no_dropout_on(tmp_path: Path) -> None:
    """It needs train mode, and a reward model may have been trained with dropout on its adapter."""
    found = folders("llava")
    reward = shutil.copytree(found["reward"], tmp_path / "reward")
    config = json.loads((reward / "adapter_config.json").read_text())
    (reward / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.5}))
    load = dict(critics=False, lora=LORA)
    plain = AdapterRoles.from_pretrained(found["base"], reward, found["cost"], **load)
    frugal = AdapterRoles.from_pretrained(found["base"], reward, found["cost"], gradient_checkpointing=True, **load)
    for score, expected in zip(frugal.scores(*batch(frugal)), plain.scores(*batch(plain)), strict=True):
        torch.testing.assert_close(score, expected, rtol=0, atol=0)


def test_roles_without_reward_and_cost_models() -> None:
    """Rewards from rules: critics start from the base with a head of zeros, or are left out."""
    start = folders("llava")["base"]
    roles = AdapterRoles.from_pretrained(start, lora=LORA)
    inputs, responses = batch(roles)
    assert not roles.values(inputs, responses, "reward").any()
    roles.values(inputs, responses, "reward").sum().backward()
    assert roles.heads["reward_critic"].weight.grad.any()
    with pytest.raises(ValueError, match="no reward, so no scores"):
        roles.scores(inputs, responses)
    alone = AdapterRoles.from_pretrained(start, critics=False, lora=LORA)
    with pytest.raises(ValueError, match="no cost_critic, so no values"):
        alone.values(inputs, responses, "cost")
    with pytest.raises(ValueError, match="no cost_critic, so no parameters"):
        alone.critic_parameters("cost")
    with pytest.raises(ValueError, match="'policy' or 'reference'"):
        alone.logps(inputs, responses, "reward")  # type: ignore[arg-type]


def test_unfit_reward_models_are_refused(tmp_path: Path) -> None:
    found = folders("llava")
    with pytest.raises(ValueError, match="use SeparateRoles"):
        AdapterRoles.from_pretrained(found["base"], found["full reward"], found["cost"])
    other = save("llava", tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="another base"):
        AdapterRoles.from_pretrained(other, found["reward"], found["cost"])
    two = HeadedModel(load_backbone(found["base"]), {"a": 1, "b": 1}, LORA)
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="unclear which"):
        AdapterRoles.from_pretrained(found["base"], tmp_path / "two", found["cost"])
    with pytest.raises(ValueError, match="dropout"):
        AdapterRoles.from_pretrained(found["base"], lora=LoraSettings(dropout=0.1))


def test_temperature_belongs_to_the_policys_distribution() -> None:
    roles = adapter_roles("llava")
    inputs, responses = batch(roles)
    model = load_backbone(folders("llava")["base"])
    logits = output_head(model)(response_hidden(model, inputs, responses)) / 0.7
    logits[..., list(roles.encoder.placeholder_ids)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, responses.ids[..., None])[..., 0]
    close(roles.logps(inputs, responses, "reference", temperature=0.7), expected, responses.mask, 1e-5)
