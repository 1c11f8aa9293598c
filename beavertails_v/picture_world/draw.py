"""Draws one object as a small picture: pose, size, colour, background, clutter, style, or its name as text.

Pillow alone, no font files: the same scene gives the same pixels on every machine with the same Pillow.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from beavertails_v.images import Picture
from beavertails_v.strict_yaml import read_yaml

Colour = tuple[int, int, int]
LAYER = 192  # an object is drawn on a square of this many pixels, then turned and scaled down


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What one picture shows. style 'text' writes the name; angle in degrees; size a share of the side."""

    object: str
    colour: str
    background: str
    style: str
    angle: float
    size: float
    x: float
    y: float
    clutter: int
    seed: int


@cache
def world() -> dict[str, Any]:
    """The facts of world.yaml."""
    return dict(read_yaml(resources.files(__package__).joinpath("world.yaml")))


@cache
def shapes() -> dict[str, list[list[Any]]]:
    """The primitives of shapes.yaml."""
    return dict(read_yaml(resources.files(__package__).joinpath("shapes.yaml")))


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    r, g, b = (round(c + (o - c) * share) for c, o in zip(colour, other, strict=True))
    return r, g, b


def _points(numbers: list[float], jitter: float, rng: random.Random) -> list[tuple[float, float]]:
    scale = LAYER / 140  # a margin of a seventh on each side, so that turned corners stay on the layer
    moved = [(n + 20 + rng.uniform(-jitter, jitter)) * scale for n in numbers]
    return list(zip(moved[::2], moved[1::2], strict=True))


def _stripes(layer: Image.Image, colour: Colour) -> Image.Image:
    """The layer with thin stripes of another colour where it is opaque."""
    striped = layer.copy()
    draw = ImageDraw.Draw(striped)
    for x in range(-LAYER, LAYER, 16):
        draw.line([(x, 0), (x + LAYER, LAYER)], fill=(*colour, 255), width=5)
    striped.putalpha(layer.getchannel("A"))
    return striped


def _draw_shape(scene: Scene, colour: Colour, rng: random.Random) -> Image.Image:
    layer = Image.new("RGBA", (LAYER, LAYER), (*colour, 0))
    draw = ImageDraw.Draw(layer)
    paint = {"body": colour, "dark": _mix(colour, (0, 0, 0), 0.62), "light": _mix(colour, (255, 255, 255), 0.7)}
    hollow, chalk, sketch = (scene.style == name for name in ("outline", "chalk", "sketch"))
    edge = paint["dark"] if scene.style == "shaded" else None
    for kind, role, numbers in shapes()[scene.object]:
        for _ in range(2 if chalk else 1):  # chalk: two shaky strokes, thinly filled
            points = _points(numbers, 2.5 if chalk else 2.0 if sketch else 0.0, rng)
            fill = (*paint[role], 255)
            if kind == "line":
                draw.line(points, fill=fill, width=7 if not chalk else 4, joint="curve")
                continue
            inside = None if hollow and role == "body" else (*paint[role], 140) if chalk else fill
            inside = (*_mix(paint[role], (255, 255, 255), 0.45), 255) if sketch else inside
            stroke = fill if hollow or chalk or sketch else (*edge, 255) if edge else None
            if kind == "oval":
                box = [
                    min(points[0][0], points[1][0]),
                    min(points[0][1], points[1][1]),
                    *map(max, zip(*points, strict=True)),
                ]
                draw.ellipse(box, fill=inside, outline=stroke, width=6 if not chalk else 4)
            else:
                draw.polygon(points, fill=inside, outline=stroke, width=6 if not chalk else 4)
    return _stripes(layer, paint["light"]) if scene.style == "striped" else layer


_font = cache(ImageFont.load_default)


@cache
def _fitting(word: str) -> Any:
    """The largest font, of 60 pixels at most, in which a word fits a layer's width."""
    draw = ImageDraw.Draw(Image.new("RGBA", (LAYER, LAYER)))
    return next(f for f in map(_font, range(60, 0, -2)) if draw.textlength(word, font=f) <= LAYER * 0.98)


def _draw_text(scene: Scene, colour: Colour) -> Image.Image:
    layer = Image.new("RGBA", (LAYER, LAYER), (*colour, 0))
    draw = ImageDraw.Draw(layer)
    word = scene.object.upper()
    draw.text(
        (LAYER / 2, LAYER / 2),
        word,
        font=_fitting(word),
        fill=(*colour, 255),
        anchor="mm",
        stroke_width=2,
    )
    return layer


def _picture_layer(path: Path) -> Image.Image:
    Picture.from_path(path).check(full=False)  # size and format, before anything is decoded
    with Image.open(path) as image:
        picture = image.convert("RGBA")
    picture.thumbnail((LAYER * 5 // 7, LAYER * 5 // 7))
    layer = Image.new("RGBA", (LAYER, LAYER), (0, 0, 0, 0))
    layer.alpha_composite(picture, ((LAYER - picture.width) // 2, (LAYER - picture.height) // 2))
    return layer


def draw(scene: Scene, pictures: Path | None = None) -> Image.Image:
    """The scene as an RGB picture of world()['size'] pixels a side.

    With `pictures`, a folder OBJECT/STYLE.png, the object is that picture instead of a drawing (text stays text).
    """
    facts, rng = world(), random.Random(scene.seed)
    side = facts["size"]
    colour: Colour = tuple(facts["colours"].get(scene.colour, (0, 0, 0)))  # pictures from a folder bring their own
    background: Colour = tuple(facts["backgrounds"][scene.background])
    canvas = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(canvas)
    for _ in range(scene.clutter):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(1, 3)
        pen.ellipse([x - r, y - r, x + r, y + r], fill=_mix(background, (128, 128, 128), rng.uniform(0.3, 0.8)))
    if scene.style == "text":
        layer, turn = _draw_text(scene, colour), scene.angle / 4
    elif pictures is not None:
        layer, turn = _picture_layer(pictures / scene.object / f"{scene.style}.png"), scene.angle
    else:
        layer, turn = _draw_shape(scene, colour, rng), scene.angle
    width = round(side * scene.size)
    layer = layer.rotate(turn, Image.Resampling.BILINEAR).resize(
        (width, width), Image.Resampling.BOX, reducing_gap=None
    )
    canvas.paste(layer, (round((side - width) * scene.x), round((side - width) * scene.y)), layer)
    return canvas
