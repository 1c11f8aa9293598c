"""From an opened Pillow image to the RGB pixels that a person sees: upright, in sRGB, alpha flattened onto white."""

from __future__ import annotations

import io
import zlib
from functools import lru_cache

from PIL import Image, ImageCms

from beavertails_v.errors import UserError

#: Pillow's image modes that carry an alpha channel.
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
#: Pillow's modes of 16 and 32 bits a pixel, scaled (not clipped) down to 8 bits.
_DEEP_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
#: Formats whose alpha bytes are often left at 0 by programs that mean opaque; Windows and browsers show those opaque.
_ALPHA_OFTEN_UNSET = frozenset({"BMP", "DIB", "ICO", "CUR", "TGA"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: A picture counts as blank where fewer than this share of its pixels leave the commonest level of a channel.
_BLANK_SHARE, _BLANK_LEVELS = 0.005, 8
#: Encoding gamma of sRGB; a PNG that claims another is shown by browsers through the matching curve.
_SRGB_GAMMA = 0.45455


class BlankError(UserError, ValueError):
    """What the picture shows is lost where transparency or a profile is applied, so nobody can say what people see."""


def visible_rgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """The picture as RGB. profile: an ICC profile, where it was taken out of the file; else the image's own is used.

    Raises BlankError where the result is blank and the colour planes or the transparency are not; ValueError for pixels
    without a fixed range.
    """
    image.load()
    profile = profile or image.info.get("icc_profile")
    upright = _UPRIGHT.get(_orientation(image))
    opaque, alpha = _planes(image)
    stored = _plain_rgb(opaque)
    clean = _to_srgb(opaque, profile) if profile else _through_gamma(stored, image)
    if alpha is not None:
        clean = Image.composite(clean, Image.new("RGB", clean.size, "white"), alpha)
    if clean is not stored and _blank(clean) and not all(map(_blank, filter(None, (stored, alpha)))):
        raise BlankError(
            "it comes out blank where its transparency, colour profile or gamma is applied, though its pixels hold "
            "something; save it without transparency on the background you mean"
        )
    clean = clean.transpose(upright) if upright is not None else clean
    bare = Image.new("RGB", clean.size)  # a new image, so that no metadata comes along
    bare.paste(clean)
    return bare


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata is met with every kind of error, and no viewer refuses the picture for it
        return 1


def _planes(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colour planes as stored, and the alpha channel where there is one that is meant and not opaque throughout."""
    if image.mode == "F" or (image.mode == "I" and image.format is None):  # a file's "I" is 16 bits, by its format
        raise ValueError("pixels are numbers without a fixed range; save the picture with 8 bits a channel")
    if image.mode in _DEEP_MODES:
        image = _eight_bits(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La")
        full = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        alpha = full.getchannel("A")
        low, high = alpha.getextrema()
        opaque = full.convert("RGB")
        unset = image.format in _ALPHA_OFTEN_UNSET and high == 0
        return (opaque.getchannel("R") if grey else opaque), (None if low == 255 or unset else alpha)
    return image, None


def _eight_bits(image: Image.Image) -> Image.Image:
    key, file_format = image.info.get("transparency"), image.format
    image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    image.format = file_format  # type: ignore[misc]
    if isinstance(key, int):
        image.info["transparency"] = key // 257
    return image


def _plain_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB pixels; through the profile where it can be used, which browsers too ignore where it is broken."""
    if profile:
        image = image if image.mode in ("RGB", "L", "CMYK", "LAB") else image.convert("RGB")
        transform = _transform(profile, image.mode)
        if transform is not None:
            return transform.apply(image)
    return _plain_rgb(image)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _through_gamma(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """A PNG's gAMA chunk, applied as browsers do where no profile and no sRGB chunk stands beside it."""
    gamma = image.info.get("gamma")
    if not gamma or "srgb" in image.info or abs(gamma - _SRGB_GAMMA) < 0.01:
        return rgb
    power = _SRGB_GAMMA / gamma
    return rgb.point([round(255 * (level / 255) ** power) for level in range(256)] * 3)


def _blank(image: Image.Image) -> bool:
    """Whether next to every pixel has the same colour: in each channel, all but a few near the commonest level."""
    counts, size = image.histogram(), image.width * image.height
    for start in range(0, len(counts), 256):
        channel = counts[start : start + 256]
        mode = channel.index(max(channel))
        near = sum(channel[max(0, mode - _BLANK_LEVELS) : mode + _BLANK_LEVELS + 1])
        if size - near > _BLANK_SHARE * size:
            return False
    return True


# -- metadata of PNG files, which is not used and may be of any size

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: The ancillary chunks that matter to what is seen, and those of animations, which are counted.
_KEPT = frozenset({b"tRNS", b"gAMA", b"sRGB", b"eXIf", b"acTL", b"fcTL", b"fdAT"})
_PROFILE_BYTES = 16 * 1024 * 1024


def png_without_metadata(data: bytes) -> tuple[bytes, bytes | None]:
    """(the file without the chunks that do not change what is seen, its ICC profile): metadata refuses no picture.

    Any other file comes back as it is. A profile that is broken or over 16 MiB is left out, as viewers do.
    """
    if not data.startswith(_SIGNATURE):
        return data, None
    kept, profile, position = [_SIGNATURE], None, len(_SIGNATURE)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        chunk, kind = data[position:end], data[position + 4 : position + 8]
        if kind == b"iCCP" and _intact(chunk):
            profile = _inflated(chunk[8:-4].partition(b"\0")[2][1:])
        if not kind[0] & 0x20 or (kind in _KEPT and _intact(chunk)):  # an upper-case first letter: the picture itself
            kept.append(chunk)
        position = end
        if kind == b"IEND":
            break
    return b"".join(kept), profile


def _intact(chunk: bytes) -> bool:
    return zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


def _inflated(data: bytes) -> bytes | None:
    inflate = zlib.decompressobj()
    try:
        found = inflate.decompress(data, _PROFILE_BYTES)
    except zlib.error:
        return None
    return None if inflate.unconsumed_tail else found
