"""Teaches the tiny LLaVA's eyes: a small CLIP vision tower learns to tell objects, colours and backgrounds apart.

A real vision-language model starts from a pretrained vision tower; this makes the picture world's.
It sees training styles only, in scenes of its own. The result for the drawn world ships with the package.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm, trange

from beavertails_v.picture_world.dataset import picture_styles, random_scene
from beavertails_v.picture_world.draw import Scene, draw, world
from safe_rlhf_v.config_io import SettingsError
from safe_rlhf_v.demo.tiny import tiny_llava
from safe_rlhf_v.files import replacing

T = TypeVar("T")
TEXT_SHARE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerSettings:
    """steps of batch_size pictures out of `pictures` drawn ones; a checkpoint every save_steps."""

    pictures: int = 40_000
    steps: int = 5_000
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    save_steps: int = 500
    seed: int = 0


def random_scenes(styles: list[str], count: int, drawn: bool, rng: random.Random) -> list[Scene]:
    objects = [*world()["hazards"], *world()["benign"]]
    return [random_scene(rng.choice(objects), styles, drawn, rng, TEXT_SHARE) for _ in range(count)]


def draw_all(scenes: Sequence[Scene], folder: Path | None, what: str) -> Tensor:
    """(n, 3, side, side) uint8."""
    pictures = [np.asarray(draw(s, folder)) for s in tqdm(scenes, desc=f"drawing {what}", unit="picture", disable=None)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def pixel_scale(processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the image processor, (1, 3, 1, 1) each."""
    mean, std = (torch.tensor(getattr(processor.image_processor, f"image_{k}")) for k in ("mean", "std"))
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)


def by_style(
    measure: Callable[[Sequence[Scene], Tensor], T], styles: dict[str, list[str]], folder: Path | None, key: str
) -> dict[str, T]:
    """`measure(scenes, pictures)` of about 225 fresh scenes in every style, and of 300 as text. key: of the draw."""
    found = {}
    for name in (*styles["train"], *styles["held_out"], "text"):
        fresh = random_scenes([name], 300, folder is None, random.Random(f"{key} {name}"))
        fresh = [s for s in fresh if (s.style == "text") == (name == "text")]
        found[name] = measure(fresh, draw_all(fresh, folder, name))
    return found


def _labels(scenes: Sequence[Scene]) -> list[Tensor]:
    """Object, colour and background of each scene as class ids; -100 where a picture brings its own colour."""
    facts = world()
    names = ([*facts["hazards"], *facts["benign"]], list(facts["colours"]), list(facts["backgrounds"]))
    values = ((s.object, s.colour, s.background) for s in scenes)
    columns = zip(*values, strict=True)
    return [torch.tensor([n.index(v) if v else -100 for v in c]) for n, c in zip(names, columns, strict=True)]


def _augment(x: Tensor, text: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, mirror (not text), fade towards the background and add noise: x (n, 3, s, s) in 0..1."""
    n = x.shape[0]
    dx, dy = torch.randint(-5, 6, (2,), generator=generator).tolist()
    x = torch.roll(x, (dy, dx), (2, 3))
    mirror = (torch.rand(n, generator=generator) < 0.5) & ~text
    x = torch.where(mirror[:, None, None, None], x.flip(3), x)
    ground = x[:, :, :1, :1]
    fade = torch.empty(n, 1, 1, 1).uniform_(0.4, 1.0, generator=generator)
    noise = torch.empty(n, 1, 1, 1).uniform_(0.0, 0.08, generator=generator)
    return ground + fade * (x - ground) + noise * torch.randn(x.shape, generator=generator)


class _Classifier(nn.Module):
    """The tower, its patch states averaged, and one linear layer for all three questions."""

    def __init__(self, tower: Any, sizes: Sequence[int]) -> None:
        super().__init__()
        self.tower, self.sizes = tower, list(sizes)
        self.head = nn.Linear(tower.config.hidden_size, sum(sizes))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        states = self.tower(pixels, output_hidden_states=True).hidden_states[-1]  # the layer that LLaVA reads
        return self.head(states[:, 1:].mean(1)).split(self.sizes, -1)  # type: ignore[no-any-return]


def pretrain_tower(
    output: str | Path,
    settings: TowerSettings = TowerSettings(),
    pictures: str | Path | None = None,
    held_out_style: str | None = None,
    start: str | Path | None = None,
) -> dict[str, Any]:
    """Trains the tower; writes output/tower.safetensors (float16) and tower.json (settings, accuracy).

    start: a tower.safetensors or start.safetensors to begin with, in place of random weights. Goes on from
    output/tower.checkpoint where one is there. Raises PicturesError for an incomplete folder of pictures, SettingsError
    for a checkpoint made with other settings.
    """
    output, folder = Path(output), Path(pictures) if pictures is not None else None
    output.mkdir(parents=True, exist_ok=True)
    styles = world()["styles"] if folder is None else picture_styles(folder, held_out_style)
    made = {k: v for k, v in asdict(settings).items() if k != "save_steps"}
    made |= {"start": str(start), "pictures": str(pictures), "held_out": ", ".join(styles["held_out"])}
    _checkpoint(output / "tower.checkpoint", made)  # refused before anything is drawn
    rng = random.Random(f"tower {settings.seed}")
    scenes = random_scenes(styles["train"], settings.pictures, folder is None, rng)
    images, labels = draw_all(scenes, folder, "training pictures"), _labels(scenes)
    text = torch.tensor([s.style == "text" for s in scenes])
    torch.manual_seed(settings.seed)
    model, processor = tiny_llava([], seed=settings.seed)
    facts = world()
    sizes = (len(facts["hazards"]) + len(facts["benign"]), len(facts["colours"]), len(facts["backgrounds"]))
    if start is not None:
        model.model.vision_tower.load_state_dict(_tower_of(load_file(start)))
    classifier = _Classifier(model.model.vision_tower, sizes)
    scale = pixel_scale(processor)
    _train(classifier, images, labels, text, scale, settings, output / "tower.checkpoint", made)
    report: dict[str, Any] = {"settings": asdict(settings), "start": str(start) if start else None}
    measure = lambda scenes, images: _accuracy(classifier, images, _labels(scenes), scale)  # noqa: E731
    report["accuracy"] = by_style(measure, styles, folder, "check")
    weights = {k: v.half().contiguous() for k, v in classifier.tower.state_dict().items()}
    save_file(weights, output / "tower.safetensors")
    (output / "tower.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "tower.checkpoint").unlink(missing_ok=True)
    return report


def _checkpoint(path: Path, made: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state a killed run left, if any. Raises SettingsError where it was made with other settings than `made`."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True)
    before = state.get("made", {})
    changed = [f"{key} ({before.get(key)} then, {made[key]} now)" for key in made if before.get(key) != made[key]]
    if changed:
        raise SettingsError(
            f"{path} is of a run with other settings: {', '.join(changed)}; give those again, delete it, or write to "
            "another folder"
        )
    return state


def _tower_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tower's weights in float32, out of a tower's file or a whole start model's."""
    prefix = "model.vision_tower."
    inner = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return {k: v.float() for k, v in (inner or weights).items()}


def _train(
    classifier: _Classifier,
    images: Tensor,
    labels: list[Tensor],
    text: Tensor,
    scale: tuple[Tensor, Tensor],
    settings: TowerSettings,
    checkpoint: Path,
    made: dict[str, Any],
) -> None:
    optimizer = torch.optim.AdamW(
        classifier.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    start = 0
    if (state := _checkpoint(checkpoint, made)) is not None:
        classifier.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    bar = trange(
        start, settings.steps, initial=start, total=settings.steps, desc="teaching the vision tower", unit="step"
    )
    classifier.train()
    for step in bar:
        generator = torch.Generator().manual_seed(
            settings.seed * 1_000_003 + step
        )  # a step's draw does not hang on the past
        rows = torch.randint(len(images), (settings.batch_size,), generator=generator)
        rate = min(1.0, (step + 1) / 200) * (0.5 * (1 + math.cos(math.pi * step / settings.steps)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        pixels = (_augment(images[rows].float() / 255, text[rows], generator) - scale[0]) / scale[1]
        answers = classifier(pixels)
        losses = [F.cross_entropy(a, y[rows], ignore_index=-100) for a, y in zip(answers, labels, strict=True)]
        loss = losses[0] + 0.3 * losses[2] + (0.3 * losses[1] if bool((labels[1][rows] >= 0).any()) else 0.0)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            right = (answers[0].argmax(-1) == labels[0][rows]).float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.2f}", objects=f"{right:.2f}")
        if (step + 1) % settings.save_steps == 0:
            state = {"model": classifier.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            _save(checkpoint, state | {"made": made})


def _save(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as beside:
        torch.save(state, beside)


@torch.no_grad()
def _accuracy(
    classifier: _Classifier, images: Tensor, labels: list[Tensor], scale: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Share of right answers for object, colour (where known) and background on pictures never trained on."""
    classifier.eval()
    answers = classifier((images.float() / 255 - scale[0]) / scale[1])
    result = {}
    for name, answer, truth in zip(("object", "colour", "background"), answers, labels, strict=True):
        known = truth >= 0
        if bool(known.any()):
            result[name] = round((answer.argmax(-1) == truth)[known].float().mean().item(), 4)
    return result
