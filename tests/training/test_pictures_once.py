"""In a step of the online loop each picture goes through the vision tower once, for all samples, roles and updates."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from rounding import close
from tiny_models import FAMILIES, prompts, save

from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.duals import LogDual
from safe_rlhf_v.online.loop import OnlineArguments, OnlineTrainer
from safe_rlhf_v.roles.protocol import AdapterRoles, SeparateRoles
from safe_rlhf_v.vlm import shared_prompts as prefix
from safe_rlhf_v.vlm.backbone import LoraSettings, load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel

LORA = LoraSettings(r=2)


@cache
def folders(family: str) -> dict[str, Path]:
    """A base, reward and cost adapters on it, and full reward and cost models whose tower is the base's."""
    root = Path(mkdtemp())
    found = {"base": save(family, root / "base")}
    for name in ("reward", "cost"):
        for kind, lora in (("adapters", LORA), ("separate", None)):
            found[f"{kind} {name}"] = root / f"{kind} {name}"
            HeadedModel(load_backbone(found["base"]), {name: 1}, lora).save_pretrained(found[f"{kind} {name}"])
    return found


def roles(family: str, kind: str, **options: Any) -> Any:
    found = folders(family)
    options.setdefault("dtype", "float64")  # two ways to the same probabilities draw the same tokens
    torch.manual_seed(0)  # of fresh adapters
    cls, own = (AdapterRoles, {"lora": LORA}) if kind == "adapters" else (SeparateRoles, {})
    return cls.from_pretrained(found["base"], found[f"{kind} reward"], found[f"{kind} cost"], **own, **options)


def pictures_seen(made: Any) -> list[int]:
    """Fills with the number of pictures of each pass through any vision tower of the roles."""
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        grid = kwargs.get("grid_thw")
        pixels = args[0] if args else kwargs.get("pixel_values")
        seen.append(len(grid) if grid is not None else len(pixels))

    models = [made.backbone] if isinstance(made, AdapterRoles) else made.models.values()
    for tower in {id(t): t for t in (m.get_encoder(modality="image") for m in models)}.values():
        tower.register_forward_pre_hook(count, with_kwargs=True)
    return seen


def train(made: Any, output_dir: Path, **changes: Any) -> list[dict[str, Any]]:
    arguments: dict[str, Any] = dict(
        max_steps=1, per_device_train_batch_size=4, num_generations=3, mini_batch_size=4, num_ppo_epochs=2,
        max_new_tokens=4, guidance_rollouts=0, disable_tqdm=True,
    )  # fmt: skip
    args = OnlineArguments(output_dir=output_dir, **(arguments | changes))
    return OnlineTrainer(made, PPOLag(), PPOLag().constraint(LogDual(0.1, 1.0, 5.0)), prompts(), args).train().metrics


@pytest.mark.parametrize("kind", ["adapters", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_encodes_each_picture_once(family: str, kind: str, tmp_path: Path) -> None:
    """Four pictures in all: 12 samples, two passes of three networks, four looks and two scores see none of them again.

    Idefics3 cuts a picture into tiles and joins them with zeros; its tower sees the tiles.
    """
    made = roles(family, kind)
    seen = pictures_seen(made)
    train(made, tmp_path)
    assert len(seen) == 1, "one pass of the tower in the whole step"
    if family != "idefics3":
        assert seen == [4]


@pytest.mark.parametrize("kind", ["adapters", "separate"])
def test_the_cache_keeps_them_between_steps_within_its_bound(kind: str, tmp_path: Path) -> None:
    """A picture's 4 tokens of width 16 take 256 bytes in float32; three rows hold one, two and one pictures."""
    for limit in (1024, 1023):
        made = roles("llava", kind, vision_cache_bytes=limit, dtype="float32")
        seen = pictures_seen(made)
        train(made, tmp_path / str(limit), max_steps=2)
        assert made._cache.used <= limit
        assert len(seen) == 3 if limit == 1024 else len(seen) > 3, "row by row, and again what was dropped"


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("kind", ["adapters", "separate"])
def test_pictures_encoded_afresh_give_the_same_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the released trainer does, encoding a picture at every pass, is only slower."""
    once = train(roles("llava", kind), tmp_path / "once", max_steps=2)
    made = roles("llava", kind)
    monkeypatch.setattr(type(made), "prepare", lambda self, inputs: inputs)
    seen = pictures_seen(made)
    afresh = train(made, tmp_path / "afresh", max_steps=2)
    assert len(seen) > 20
    for a, b in zip(once, afresh, strict=True):
        close({**b, "seconds": 0}, {**a, "seconds": 0})


def prompts_read(made: Any) -> list[int]:
    """Fills with the rows of each pass of the policy's decoder that takes gradients."""
    seen: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        seen.extend([len(kwargs["inputs_embeds"])] if torch.is_grad_enabled() else [])

    model = made.backbone if isinstance(made, AdapterRoles) else made.models["policy"]
    model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    return seen


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("kind", ["adapters", "separate"])
def test_an_update_reads_a_prompt_once_for_its_samples(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two minibatches of two prompts with three samples, in passes of three rows: the samples of one prompt."""
    options: dict[str, Any] = dict(max_steps=2, mini_batch_size=6, num_ppo_epochs=1)
    made = roles("llava", kind)
    assert made.reads_once(made.encoder.prompts(prompts()))
    read = prompts_read(made)
    once = train(made, tmp_path / "once", per_device_micro_batch_size=3, **options)
    networks = 3 if kind == "adapters" else 1
    assert read == [1, 3] * (2 * 2 * 2 * networks)
    monkeypatch.setattr(prefix, "reads_once", lambda *args: False)
    monkeypatch.setattr(type(made), "reads_once", lambda self, inputs: False)
    made = roles("llava", kind)
    read = prompts_read(made)
    afresh = train(made, tmp_path / "afresh", **options)
    assert read == [6] * (2 * 2 * networks)
    for a, b in zip(once, afresh, strict=True):
        close({**b, "seconds": 0}, {**a, "seconds": 0})


OPTIONS: list[dict[str, Any]] = [{"gradient_checkpointing": True}, {"cache": "static"}]


@pytest.mark.usefixtures("smooth")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("kind", ["adapters", "separate"])
def test_options_that_save_memory_or_time_change_no_result(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    rows = [train(roles("llava", kind, **o), tmp_path / str(i), max_steps=2) for i, o in enumerate(({}, options))]
    for a, b in zip(*rows, strict=True):
        close({**b, "seconds": 0}, {**a, "seconds": 0})


@pytest.mark.parametrize("kind", ["adapters", "separate"])
def test_bf16_computes_in_bfloat16_and_keeps_heads_and_weights_wide(kind: str, tmp_path: Path) -> None:
    made, plain = roles("llava", kind, bf16=True, dtype="float32"), roles("llava", kind, dtype="float32")
    look = (made.encoder.prompts(prompts()), made.encoder.responses(["a", "b c", "first", "no"]))
    for how in ("logps", "values", "scores"):
        narrow, wide = getattr(made, how)(*look), getattr(plain, how)(*look)
        narrow, wide = (narrow[0], wide[0]) if how == "scores" else (narrow, wide)
        assert narrow.dtype == torch.float32 and not torch.equal(narrow, wide)
        torch.testing.assert_close(narrow, wide, rtol=0.1, atol=0.2)
    train(made, tmp_path)
    assert {p.dtype for p in made.policy_parameters()} == {torch.float32}
