"""Teaches the picture world's start model to say what it sees: the tower frozen, projector and language model trained.

What LLaVA's pretraining on captions is to a real model (arXiv 2304.08485, section 4.2). Only harmless questions, "what
is this" and "what is it for", about training styles, wordings and combinations.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm, trange
from transformers import get_cosine_schedule_with_warmup
from transformers.modeling_outputs import BaseModelOutputWithPooling

from beavertails_v.picture_world.dataset import picture_styles
from beavertails_v.picture_world.draw import Scene, world
from beavertails_v.picture_world.language import Question, answer, combination_held_out, wordings
from safe_rlhf_v.demo.tiny import picture_world_model
from safe_rlhf_v.demo.tower import TowerSettings, by_style, draw_all, pixel_scale, random_scenes
from safe_rlhf_v.losses import token_cross_entropy
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.vlm.processing import stack_responses

LEVELS = ("named", "full", "full")


def teach_names(
    output: str | Path,
    tower: str | Path,
    settings: TowerSettings = TowerSettings(pictures=20_000, steps=1_500, learning_rate=2e-3),  # noqa: B008
    pictures: str | Path | None = None,
    held_out_style: str | None = None,
) -> dict[str, Any]:
    """Trains on a tower made by `pretrain_tower`; writes output/start.safetensors (float16) and start.json.

    accuracy: share of fresh pictures per style whose object the model names. A killed run starts afresh.
    """
    output, folder = Path(output), Path(pictures) if pictures is not None else None
    output.mkdir(parents=True, exist_ok=True)
    styles = world()["styles"] if folder is None else picture_styles(folder, held_out_style)
    model, processor = picture_world_model(tower=tower, seed=settings.seed)
    scenes = random_scenes(styles["train"], settings.pictures, folder is None, random.Random(f"naming {settings.seed}"))
    scale = pixel_scale(processor)
    states = _see(model, draw_all(scenes, folder, "pictures to name"), scale)
    _train(model, processor, scenes, states, settings)
    measure = lambda fresh, images: _named(model, processor, fresh, _see(model, images, scale))  # noqa: E731
    accuracy = by_style(measure, styles, folder, "name")
    save_file(
        {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"},
        output / "start.safetensors",
    )
    report = {"settings": asdict(settings), "accuracy": accuracy}
    (output / "start.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


@torch.no_grad()
def _see(model: Any, images: Tensor, scale: tuple[Tensor, ...]) -> Tensor:
    """States (n, T, H) of the frozen tower, before the projector."""
    model.eval()
    batches = tqdm(images.split(256), desc="looking", unit="batch", disable=None)
    seen = [
        model.model.vision_tower((b.float() / 255 - scale[0]) / scale[1], output_hidden_states=True) for b in batches
    ]
    return torch.cat([s.hidden_states[-1][:, 1:] for s in seen])


def _hidden(model: Any, states: Tensor, prompts: Sequence[list[int]], answers: Tensor) -> Tensor:
    """(B, R, H): what predicts each answer token; prompts are left-padded with 0, the pad id of the tiny tokenizer."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    full = torch.cat([ids, answers], 1)
    features = BaseModelOutputWithPooling(pooler_output=list(model.model.multi_modal_projector(states)))  # type: ignore[arg-type]
    mask = torch.cat([ids != 0, torch.ones_like(answers, dtype=torch.bool)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model.model(
        input_ids=full, attention_mask=mask, position_ids=positions, mm_encoder_outputs={"image": features}
    )
    return out.last_hidden_state[:, width - 1 : -1]  # type: ignore[no-any-return]


def _prompt(processor: Any, question: str) -> list[int]:
    """Token ids exactly as the chat template and the processor make them."""
    images = processor.image_token * ((processor.image_processor.size["height"] // processor.patch_size) ** 2)
    return processor.tokenizer(f"<s> {images} {question} answer :", add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


def _lesson(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A harmless question about a scene, and a right answer."""
    intents = [i for i in ("describe", "describe", "use") if not combination_held_out(scene.object, i, "")]
    intent = rng.choice(intents)
    question = Question(text=rng.choice(wordings(intent, "", False)), intent=intent, topic="")
    return question.text, answer(rng.choice(LEVELS), scene, question, rng)


def _train(model: Any, processor: Any, scenes: Sequence[Scene], states: Tensor, settings: TowerSettings) -> None:
    model.model.vision_tower.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 20, settings.steps)
    rng, tokenizer = random.Random(settings.seed), processor.tokenizer
    model.train()
    for _ in (bar := trange(settings.steps, desc="learning to name", unit="step")):
        rows = [rng.randrange(len(scenes)) for _ in range(settings.batch_size)]
        questions, answers = zip(*(_lesson(scenes[i], rng) for i in rows), strict=True)
        texts = [[*tokenizer(a, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for a in answers]
        said = stack_responses(texts)
        hidden = _hidden(model, states[rows], [_prompt(processor, q) for q in questions], said.ids)
        loss = token_cross_entropy(token_logps(hidden, model.lm_head, said.ids, chunk_size=4096), said.mask)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def _named(model: Any, processor: Any, scenes: Sequence[Scene], states: Tensor) -> float:
    """Share of scenes whose object is the likeliest of all objects after "this is a"."""
    model.eval()
    objects = [*world()["hazards"], *world()["benign"]]
    ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(objects))
    prompt = (
        _prompt(processor, "what is in this picture ?")
        + processor.tokenizer("this is a", add_special_tokens=False)["input_ids"]
    )
    blank = torch.full((len(scenes), 1), processor.tokenizer.eos_token_id)
    logits = model.lm_head(_hidden(model, states, [prompt] * len(scenes), blank)[:, 0])
    said = logits[:, ids].argmax(-1).tolist()
    return round(sum(objects[k] == s.object for k, s in zip(said, scenes, strict=True)) / len(scenes), 4)
