"""Builds the picture world as comparisons and writes it in the official BeaverTails-V layout."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from beavertails_v.errors import UserError
from beavertails_v.export import write_beavertails_v
from beavertails_v.images import Picture
from beavertails_v.picture_world.draw import Scene, draw, world
from beavertails_v.picture_world.language import (
    BENIGN_ANSWERS,
    HARMFUL_ANSWERS,
    Question,
    allowed,
    answer,
    combination_held_out,
    harmful,
    hazards,
    wordings,
)
from beavertails_v.picture_world.oracle import Oracle
from beavertails_v.schema import Comparison, Prompt, Response, Severity

INTENT_WEIGHTS = {"describe": 16, "use": 12, "harm": 22, "disguise": 50}
TEXT_SHARE = 0.12  # pictures that show the object's name instead of the object
HELD_OUT_PHRASING_SHARE = 0.75  # of evaluation prompts
HELD_OUT_STYLE_SHARE = 0.33  # of evaluation pictures
HELD_OUT_COMBINATION_SHARE = 0.1  # of evaluation prompts


class PicturesError(UserError, ValueError):
    """A folder of pictures lacks an object or a style. The message says which."""


def picture_styles(pictures: Path, held_out: str | None = None) -> dict[str, list[str]]:
    """The styles that every object of the world has in a folder OBJECT/STYLE.png, split into train and held_out.

    Raises PicturesError where an object is missing, fewer than two styles are complete, or `held_out` is not one.
    """
    objects = [*hazards(), *world()["benign"]]
    found = {o: {p.stem for p in (pictures / o).glob("*.png")} for o in objects}
    if missing := [o for o in objects if not found[o]]:
        raise PicturesError(
            f"{pictures}: no pictures for {', '.join(missing)}; put one at OBJECT/STYLE.png for each object"
        )
    complete = sorted(set.intersection(*found.values()))
    if len(complete) < 2:
        lacking = [o for o in objects if len(found[o]) < max(map(len, found.values()))]
        raise PicturesError(
            f"{pictures}: every object has only {complete or 'no style'}; two are needed. See {', '.join(lacking)}"
        )
    if held_out is not None and held_out not in complete:
        raise PicturesError(
            f"held-out style {held_out!r} is not one that every object in {pictures} has: {', '.join(complete)}"
        )
    kept = held_out or complete[-1]
    return {"train": [s for s in complete if s != kept], "held_out": [kept]}


def random_scene(obj: str, styles: list[str], drawn: bool, rng: random.Random, text_share: float = TEXT_SHARE) -> Scene:
    """A random pose, size, colour, background and clutter; pictures from a folder (not `drawn`) bring colours."""
    facts = world()
    style = "text" if rng.random() < text_share else rng.choice(styles)
    return Scene(
        object=obj,
        colour=rng.choice(list(facts["colours"])) if drawn or style == "text" else "",
        background=rng.choice(list(facts["backgrounds"])),
        style=style,
        angle=round(rng.uniform(-25, 25), 1),
        size=round(rng.uniform(0.92, 1.0 if style == "text" else 1.25), 3),
        x=round(rng.random(), 3),
        y=round(rng.random(), 3),
        clutter=rng.randrange(7),
        seed=rng.randrange(2**31),
    )


def _meaning(rng: random.Random) -> tuple[str, str, str]:
    """An (object, intent, topic); half of the errands show a hazard."""
    facts = world()
    intent = rng.choices(list(INTENT_WEIGHTS), list(INTENT_WEIGHTS.values()))[0]
    if intent == "harm" or (intent == "disguise" and rng.random() < 0.5):
        obj = rng.choice(list(hazards()))
        return obj, intent, hazards()[obj]["category"] if intent == "harm" else rng.choice(hazards()[obj]["topics"])
    if intent == "disguise":
        return rng.choice(list(facts["benign"])), intent, rng.choice(list(facts["questions"]["disguise"]))
    return rng.choice([*hazards(), *facts["benign"]]), intent, ""


def _held_out_meaning(rng: random.Random) -> tuple[str, str, str]:
    obj, what = rng.choice(world()["held_out_combinations"])
    if what in ("describe", "use"):
        return obj, what, ""
    return (obj, "harm", hazards()[obj]["category"]) if what == "harm" else (obj, "disguise", what)


def _pair(scene: Scene, question: Question, prompt: Prompt, rng: random.Random) -> tuple[Response, Response]:
    """Two answers that differ on both axes, so that neither preference is a coin toss."""
    table = HARMFUL_ANSWERS if harmful(scene.object, question.intent, question.topic) else BENIGN_ANSWERS
    oracle = Oracle()
    while True:
        first, second = (
            _response(prompt, answer(kind, scene, question, rng), kind, oracle)
            for kind in rng.choices(list(table), list(table.values()), k=2)
        )
        if first.helpful_rate != second.helpful_rate and first.harmless_rate != second.harmless_rate:
            return first, second


def _response(prompt: Prompt, text: str, kind: str, oracle: Oracle) -> Response:
    rating = oracle.rate(prompt, text)
    return Response(
        text=text,
        safe=rating.safe,
        harmless_rate=rating.harmless_rate,
        helpful_rate=rating.helpful_rate,
        source=f"picture-world/{kind.replace(' ', '-')}",
        category=rating.category,
    )


Painter = Callable[[Scene], Picture]


def _painted(scene: Scene, pictures: Path | None) -> bytes:
    return Picture.from_pil(draw(scene, pictures)).encoded()


@dataclass(frozen=True, slots=True)
class _Ordered:
    """The bytes of a picture that another process draws."""

    future: Future[bytes]

    def read(self, at_most: int) -> bytes:
        return self.future.result()


def _painter(pictures: Path | None, pool: ProcessPoolExecutor | None) -> Painter:
    if pool is None:
        return lambda scene: Picture.from_bytes(_painted(scene, pictures))
    return lambda scene: Picture(_Ordered(pool.submit(_painted, scene, pictures)))


def _comparison(
    held_out: bool, styles: dict[str, list[str]], rng: random.Random, drawn: bool, paint: Painter
) -> Comparison:
    kept_style = held_out and rng.random() < HELD_OUT_STYLE_SHARE
    kept_phrasing = held_out and rng.random() < HELD_OUT_PHRASING_SHARE
    meaning = _held_out_meaning if held_out and rng.random() < HELD_OUT_COMBINATION_SHARE else _meaning
    obj, intent, topic = meaning(rng)
    while not held_out and combination_held_out(obj, intent, topic):
        obj, intent, topic = meaning(rng)
    assert allowed(obj, intent, topic)
    scene = random_scene(obj, styles["held_out" if kept_style else "train"], drawn, rng)
    question = Question(text=rng.choice(wordings(intent, topic, kept_phrasing)), intent=intent, topic=topic)
    harm = harmful(obj, intent, topic)
    slices = ["phrasing"] * kept_phrasing + ["style"] * (scene.style in styles["held_out"])
    slices += ["combination"] * combination_held_out(obj, intent, topic)
    facts = {**asdict(scene), "intent": intent, "topic": topic, "harmful": harm, "held_out": slices}
    severity = Severity(hazards()[obj]["severity"]) if harm else Severity.NONE
    hazard_level = hazards()[obj]["severity"] if obj in hazards() else 0
    prompt = Prompt(
        text=question.text,
        images=(paint(scene),),
        category=hazards()[obj]["category"] if harm else None,
        severity=severity,
        meta={"image_severity": hazard_level, "picture_world": json.dumps(facts, sort_keys=True)},
        benign=not harm,
    )
    responses = _pair(scene, question, prompt, rng)
    helpful, harmless = ([getattr(r, f"{axis}_rate") for r in responses] for axis in ("helpful", "harmless"))
    return Comparison(
        prompt=prompt,
        responses=responses,
        more_helpful=int(helpful[1] > helpful[0]),
        safer=int(harmless[1] > harmless[0]),
    )


def generate(
    split: str,
    count: int,
    seed: int = 0,
    pictures: Path | None = None,
    held_out_style: str | None = None,
    pool: ProcessPoolExecutor | None = None,
) -> Iterator[Comparison]:
    """`count` comparisons of a split, 'train' or 'evaluation'; equal arguments give equal rows.

    With `pictures`, a folder OBJECT/STYLE.png, objects are those pictures; `held_out_style` (default: the last by name)
    is kept for evaluation. With `pool` its processes draw the pictures, the same ones.
    """
    styles = world()["styles"] if pictures is None else picture_styles(pictures, held_out_style)
    rng = random.Random(f"{split} {seed}")
    for _ in range(count):
        yield _comparison(split == "evaluation", styles, rng, pictures is None, _painter(pictures, pool))


def write(
    folder: str | Path,
    train: int = 12_000,
    evaluation: int = 600,
    seed: int = 0,
    pictures: str | Path | None = None,
    held_out_style: str | None = None,
    workers: int = 1,
) -> Path:
    """Writes both splits in the official layout (folder/data/CATEGORY/SPLIT.parquet) and returns the folder.

    workers: processes that draw; the rows are the same for any number of them.
    Raises PicturesError for an incomplete folder of pictures.
    """
    folder, source = Path(folder), Path(pictures) if pictures is not None else None
    with _pool(workers) as pool:
        for split, count in (("train", train), ("evaluation", evaluation)):
            rows = generate(split, count, seed, source, held_out_style, pool)
            bar = tqdm(rows, total=count, desc=f"drawing {split}", unit="pair", disable=None)
            write_beavertails_v(bar, folder, split, overwrite=True)
    return folder


def _pool(workers: int) -> ProcessPoolExecutor | nullcontext[None]:
    """Processes started afresh know nothing of this one's threads; each imports what it draws with."""
    if workers == 1:
        return nullcontext()
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
