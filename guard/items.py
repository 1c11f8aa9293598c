"""One item as a user hands it in: pictures in any form and a text, made a Prompt, or refused with what to do.

Every fault here is that item's own: `ItemError` says which one, and nothing of it reaches its neighbours in a batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from beavertails_v.errors import UserError
from beavertails_v.images import ImageError, Picture
from beavertails_v.references import short, written_bytes
from beavertails_v.schema import Prompt, SchemaError
from guard.text import readings, visible
from safe_rlhf_v.vlm.processing import EncodingError

PICTURE_ALONE = "What is in this picture?"  # the question that stands beside a picture judged without a text
ImageLike = Picture | Image.Image | str | Path | bytes
_LONG_WORD = re.compile(r"\S{61,}")


class ContentError(UserError, ValueError):
    """A text or a picture that cannot be judged for what it is; the message says what to give instead."""


class ContentTypeError(ContentError, TypeError):
    """A text or a picture of a type that is neither."""


FAULTS = (ContentError, ImageError, EncodingError, SchemaError)
"""What the content of one item can be at fault with."""


class ItemError(UserError, ValueError):
    """An item of a batch cannot be judged. index: its position from 0; fault: what is wrong with it, of `FAULTS`."""

    def __init__(self, index: int, fault: Exception) -> None:
        self.index, self.fault = index, fault
        super().__init__(f"item {index}: {fault}")


def prompt_of(image: ImageLike | Sequence[ImageLike] | None, text: str) -> Prompt:
    """The prompt of pictures in any form and a text. Raises ContentError, or SchemaError where there is neither."""
    checked, pictures = text_of(text, "text"), pictures_of(image)
    blank = not any(map(visible, readings(checked)))
    return Prompt(text=PICTURE_ALONE if pictures and blank else checked, images=pictures)


def text_of(text: object, name: str) -> str:
    """The text, if it is one. Raises ContentError for another type and for half characters (lone surrogates)."""
    if not isinstance(text, str):
        hint = "; give '' beside a picture that is judged alone" if text is None and name == "text" else ""
        raise ContentTypeError(f"the {name} is {_kind_of(text)}, not a string{hint}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ContentError(
            f"the {name} is not UTF-8 text: character {error.start} is {text[error.start]!a}, half a character; "
            "give the text as it was written"
        ) from None
    return text


def shortened(reason: str) -> str:
    """The reason with every word over 60 characters cut there: names of files can be whole pictures in base64."""
    return _LONG_WORD.sub(lambda word: f"{word.group()[:60]}\u2026", reason)


def pictures_of(image: object) -> tuple[Picture, ...]:
    """Pictures in any form, as `moderate` takes them. Raises ContentError for what is none."""
    if image is None:
        return ()
    if isinstance(image, (list, tuple)):
        return tuple(p for one in image for p in pictures_of(one))
    if isinstance(image, Picture):
        return (image,)
    if isinstance(image, Image.Image):
        return (_in_memory(image),)
    if isinstance(image, (bytes, bytearray)):
        return (Picture.from_bytes(bytes(image)),)
    if isinstance(image, (str, Path)):
        return (_named(str(image)),)
    raise ContentTypeError(
        f"image is a {type(image).__name__}; give a PIL image, a path, bytes, a Picture, a list of them or None"
    )


def _named(text: str) -> Picture:
    """The picture of a file, or of the base64 that a text holds."""
    if (data := written_bytes(text)) is not None:
        return Picture.from_bytes(data)
    if "\0" in text or not text:
        raise ContentError(f"image {short(text)!r} is not a file name")
    return Picture.from_path(text)


def _in_memory(image: Image.Image) -> Picture:
    try:
        return Picture.from_pil(image)
    except (OSError, ValueError) as error:  # Pillow reads the file only now; ValueError: it comes out blank
        raise ContentError(f"the picture cannot be used: {error}") from error


def _kind_of(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
