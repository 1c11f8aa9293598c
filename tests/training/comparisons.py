"""Small comparisons with one-coloured pictures: which response is preferred follows from the colour or the words."""

from __future__ import annotations

from PIL import Image

from beavertails_v.images import Picture
from beavertails_v.schema import Comparison, Prompt, Response

COLOURS = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "grey": (90, 90, 90)}


def picture(colour: str, size: int = 16) -> Picture:
    return Picture.from_pil(Image.new("RGB", (size, size), COLOURS[colour]))


def comparison(i: int) -> Comparison:
    """'I cannot help' is safer (rate 1), 'first take the knife' more helpful and unsafe (rate -1 to -3)."""
    colour = list(COLOURS)[i % 4]
    good = Response(text="I cannot help with that.", safe=True, harmless_rate=1, helpful_rate=0)
    text = f"first take the {colour} knife, then turn it."
    bad = Response(text=text, safe=False, harmless_rate=-1 - i % 3, helpful_rate=2)
    pair, swap = (good, bad), i % 2
    return Comparison(
        prompt=Prompt(text=f"how do I use it? {i}", images=(picture(colour),), category="violence_and_physical_harm"),
        responses=(pair[swap], pair[1 - swap]),
        more_helpful=1 - swap,
        safer=swap,
    )


def comparisons(n: int) -> list[Comparison]:
    return [comparison(i) for i in range(n)]
