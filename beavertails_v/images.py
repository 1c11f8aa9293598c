"""The one door by which an image comes in: read within limits, refuse what is unsafe, strip, hash.

A picture is opened by its content, never by its file extension, and nothing is decoded before its size is known to be
within `ImageLimits`. What comes out is always RGB, upright (EXIF orientation applied), in sRGB and free of metadata.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from beavertails_v.errors import UserError
from beavertails_v.pixels import BlankError, png_without_metadata, visible_rgb
from beavertails_v.references import kind_of_file, local_name, not_a_name, short, written_bytes


class ImageError(UserError, ValueError):
    """A picture cannot be taken in. The message names where it stands, what is wrong and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What a picture may be at most.

    max_bytes: encoded size. max_pixels: width * height, checked before decoding; a decompression bomb dies here.
    formats: Pillow format names, recognised by content. max_aspect: longer side / shorter side.
    max_frames: 1 refuses animations, whose later frames nobody downstream would look at.
    """

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 40_000_000
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    max_aspect: float = 50.0
    max_frames: int = 1


DEFAULT_LIMITS = ImageLimits()


class Reader(Protocol):
    """Gives a picture's encoded bytes each time it is asked. Picklable."""

    def read(self, at_most: int) -> bytes:
        """The bytes; a reader may stop after `at_most`, which is one more than is allowed."""
        ...


class Picture:
    """An encoded image, decoded only when asked. Immutable, hashable by content, picklable, cheap to hold.

    It holds either bytes, or something with a `read()` that gives them (a path, a cell of a parquet file), and then
    reads afresh every time, so that a list of a million pictures costs no memory.
    """

    __slots__ = ("_reader", "_sha256", "limits", "where")

    _reader: Reader
    _sha256: str | None
    limits: ImageLimits
    where: str

    def __init__(
        self, reader: Reader, *, where: str = "", limits: ImageLimits = DEFAULT_LIMITS, sha256: str | None = None
    ) -> None:
        for name, value in (("_reader", reader), ("where", where), ("limits", limits), ("_sha256", sha256)):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Picture is immutable; cannot set {name!r}")

    @classmethod
    def from_bytes(cls, data: bytes, *, where: str = "", limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
        """A picture of these encoded bytes. Nothing is decoded or checked before `load` or `check`."""
        return cls(_Bytes(bytes(data)), where=where, limits=limits)

    @classmethod
    def from_path(cls, path: str | Path, *, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
        """A picture in a file, read when needed. Links are the caller's choice here; `picture_below` refuses them."""
        where = str(path) if not_a_name(str(path)) is None else ""
        return cls(_File(str(path)), where=where, limits=limits)

    @classmethod
    def from_pil(cls, image: Image.Image, *, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
        """A picture of an image in memory, encoded as PNG without metadata. Raises ImageError for too many frames."""
        _check_frames(image, limits, "")
        buffer = io.BytesIO()
        visible_rgb(image).save(buffer, format="PNG")
        return cls.from_bytes(buffer.getvalue(), limits=limits)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the encoded bytes."""
        if self._sha256 is None:
            object.__setattr__(self, "_sha256", hashlib.sha256(self.encoded()).hexdigest())
        return self._sha256 or ""

    def encoded(self) -> bytes:
        """The bytes as they came: own format, metadata and all. Raises ImageError for too many, none, or no file."""
        try:
            data = self._reader.read(self.limits.max_bytes + 1)
        except OSError as error:
            why = error.strerror or str(error)
            raise ImageError(f"{_at(self.where)}the picture cannot be read ({why}); restore the file") from error
        _check_bytes(data, self.limits, self.where)
        return data

    def load(self) -> Image.Image:
        """Decode to an upright RGB image in sRGB without metadata, alpha flattened onto white.

        Raises ImageError for anything outside the limits, of another format, damaged or truncated, and for a picture
        that comes out blank though its colour planes are not.
        """
        return self._guarded(visible_rgb)  # type: ignore[no-any-return]

    def check(self, *, full: bool = True) -> None:
        """Raise ImageError if `load` would. full=False looks at the header and the limits only, and misses damage."""
        self._guarded(_decode_cheaply if full else lambda image, profile: None)

    def clean(self) -> Picture:
        """The same picture re-encoded as PNG: orientation baked in, metadata gone, and so another sha256."""
        return Picture.from_pil(self.load(), limits=self.limits)

    def _guarded(self, use: Callable[[Image.Image, bytes | None], Any]) -> Any:
        data, profile = png_without_metadata(whole := self.encoded())
        try:
            # Pillow meets hostile input here and raises nearly every kind of error; all of them mean the same to us.
            with Image.open(io.BytesIO(data), formats=self.limits.formats) as image:
                _check_header(image, self.limits, self.where)
                return use(image, profile)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(_explain(error, whole, self.limits, self.where)) from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._reader, self.where, self.limits, self._sha256)

    def __repr__(self) -> str:
        return f"Picture({self.where or self._sha256 or 'in memory'})"


def picture_of(folder: Path, text: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
    """The picture that a text names: a file below `folder`, or its bytes as a data: address or base64."""
    if (data := written_bytes(text)) is not None:
        return Picture.from_bytes(data, limits=limits)
    return picture_below(folder, text, limits=limits)


def picture_below(folder: Path, name: str, *, limits: ImageLimits = DEFAULT_LIMITS) -> Picture:
    """The picture `name`, a path relative to `folder`. Raises ImageError where it leaves the folder or is a link."""
    if "\0" in name or not name:
        raise ImageError(f"image {name!r} is not a file name")
    if why := not_a_name(name):
        raise ImageError(f"image {why}")
    root, named = folder.resolve(), repr(short(name))
    path = root / local_name(root, name)
    links = [p for p in (path, *path.parents) if p != root and p.is_relative_to(root) and p.is_symlink()]
    if not path.resolve().is_relative_to(root) or Path(name).is_absolute():
        what = "is or passes through a link to a place" if links else "lies"
        raise ImageError(f"image {named} {what} outside {folder}; copy the file below the folder and name it there")
    if links:
        raise ImageError(f"image {named} is or passes through a link; copy the file into {folder}")
    if not path.is_file():
        raise ImageError(f"image {named} is not a file below {folder}")
    return Picture.from_path(path, limits=limits)


@dataclass(frozen=True, slots=True)
class _Bytes:
    data: bytes

    def read(self, at_most: int) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class _File:
    path: str

    def read(self, at_most: int) -> bytes:
        if (why := not_a_name(self.path)) and not os.path.exists(self.path):
            raise ImageError(why)
        with open(self.path, "rb") as file:
            return file.read(at_most)


def _rebuild(reader: Reader, where: str, limits: ImageLimits, sha256: str | None) -> Picture:
    return Picture(reader, where=where, limits=limits, sha256=sha256)


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _check_bytes(data: bytes, limits: ImageLimits, where: str) -> None:
    if not data:
        raise ImageError(f"{_at(where)}the picture is empty (0 bytes); restore the file or drop the row")
    if len(data) > limits.max_bytes:
        raise ImageError(
            f"{_at(where)}the picture has more bytes than the limit of {limits.max_bytes:,}; "
            "shrink it or raise ImageLimits.max_bytes"
        )


def _check_header(image: Image.Image, limits: ImageLimits, where: str) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{_at(where)}the picture has {width}x{height} = {width * height:,} pixels, over the limit of "
            f"{limits.max_pixels:,}; shrink it or raise ImageLimits.max_pixels"
        )
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageError(
            f"{_at(where)}the picture is {width}x{height}, longer than {limits.max_aspect:g}:1; "
            "crop it or raise ImageLimits.max_aspect"
        )
    _check_frames(image, limits, where)


def _check_frames(image: Image.Image, limits: ImageLimits, where: str) -> None:
    # MPO is what cameras write as JPEG: the further frames are a depth map or a second eye, which no viewer shows.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > limits.max_frames:
        raise ImageError(
            f"{_at(where)}the picture has {frames} frames, over the limit of {limits.max_frames}; "
            "save the frame you mean or raise ImageLimits.max_frames (only the first is ever used)"
        )


def _decode_cheaply(image: Image.Image, profile: bytes | None) -> None:
    """All that `load` does; but a JPEG at an eighth of its size, which reads the whole stream and damage shows too."""
    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
    visible_rgb(image, profile)


def _explain(error: Exception, data: bytes, limits: ImageLimits, where: str) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        formats, kind = ", ".join(limits.formats), kind_of_file(data)
        what = f": the file {kind}" if kind else ""
        return f"{_at(where)}not a picture of an allowed format ({formats}), going by its content{what}"
    if isinstance(error, BlankError):
        return f"{_at(where)}{error}"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"{_at(where)}refused as a decompression bomb: {error}"
    return f"{_at(where)}the picture is damaged or truncated ({type(error).__name__}: {error}); replace it"
