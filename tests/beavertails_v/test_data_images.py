from __future__ import annotations

import base64
import hashlib
import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from beavertails_v.images import ImageError, ImageLimits, Picture, picture_below, picture_of


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noisy(size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims this size and holds next to nothing: what a decompression bomb looks like."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def refused(data: bytes, **limits: object) -> str:
    picture = Picture.from_bytes(data, where="rows.parquet row 7", limits=ImageLimits(**limits))  # type: ignore[arg-type]
    for use in (picture.load, picture.check):
        with pytest.raises(ImageError, match="rows.parquet row 7") as error:
            use()
    return str(error.value)


def test_sha256_is_of_the_bytes_as_they_came() -> None:
    data = encode(noisy())
    picture = Picture.from_bytes(data)
    assert picture.encoded() == data
    assert picture.sha256 == hashlib.sha256(data).hexdigest()


def test_equal_bytes_are_equal_pictures_wherever_they_stand(tmp_path: Path) -> None:
    data = encode(noisy())
    (tmp_path / "a.png").write_bytes(data)
    there = Picture.from_path(tmp_path / "a.png")
    assert there == Picture.from_bytes(data)
    assert hash(there) == hash(Picture.from_bytes(data))
    assert there != Picture.from_bytes(encode(noisy((8, 8))))


def test_picture_is_immutable_and_pickles_without_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(noisy((400, 400))))
    picture = Picture.from_path(tmp_path / "a.png", limits=ImageLimits(max_aspect=3))
    again = pickle.loads(pickle.dumps(picture))
    assert again == picture and again.limits.max_aspect == 3 and again.where == picture.where
    assert len(pickle.dumps(picture)) < 1000
    with pytest.raises(AttributeError, match="immutable"):
        picture.where = "elsewhere"


def test_from_pil_keeps_the_pixels() -> None:
    image = noisy()
    assert Picture.from_pil(image).load().tobytes() == image.tobytes()


def test_orientation_is_applied_and_metadata_is_gone() -> None:
    # 4 wide, 2 high, left half red. Orientation 6 = turn by 90 degrees clockwise: 2 wide, 4 high, the top red.
    image = Image.new("RGB", (32, 16), "blue")
    image.paste((255, 0, 0), (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    picture = Picture.from_bytes(encode(image, "JPEG", exif=exif, quality=95, comment=b"where I live"))
    upright = picture.load()
    assert upright.size == (16, 32)
    red, _, blue = upright.getpixel((8, 4))
    assert red > 200 and blue < 60
    assert not upright.getexif() and not upright.info
    assert not picture.clean().load().getexif()
    assert b"where I live" in picture.encoded() and b"where I live" not in picture.clean().encoded()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    if mode == "P":
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 9, 9, 9])
        palette.putpixel((0, 0), 0)
        data = encode(palette, transparency=1)
    else:
        data = encode(image.convert(mode))
    loaded = Picture.from_bytes(data).load()
    assert loaded.mode == "RGB"
    assert loaded.getpixel((3, 3)) == (255, 255, 255) and loaded.getpixel((0, 0)) == (0, 0, 0)


def test_half_transparent_black_is_mid_grey() -> None:
    # 0 * 128/255 + 255 * 127/255 = 127
    value = Picture.from_bytes(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))).load().getpixel((0, 0))
    assert all(abs(v - 127) <= 1 for v in value)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32896, 65535)):  # 32896 = 128 * 257
        image.putpixel((x, 0), value)
    loaded = Picture.from_bytes(encode(image)).load()
    assert [loaded.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_cmyk_and_grey_and_one_bit_become_rgb() -> None:
    cmyk = Picture.from_bytes(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).load()
    red, green, _ = cmyk.getpixel((8, 8))
    assert cmyk.mode == "RGB" and red > 200 and green < 60
    assert Picture.from_bytes(encode(Image.new("L", (4, 4), 99))).load().getpixel((0, 0)) == (99, 99, 99)
    assert Picture.from_bytes(encode(Image.new("1", (4, 4), 1))).load().getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_before_decoding() -> None:
    assert "decompression bomb" in refused(png_header(20000, 20000))  # Pillow's own error, beyond 178,956,970 pixels
    assert "100,000,000 pixels" in refused(png_header(10000, 10000))  # where Pillow only warns, beyond 89,478,485
    assert "49,000,000 pixels" in refused(png_header(7000, 7000))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_pillows_warning_as_an_error_reads_the_same() -> None:
    assert "decompression bomb" in refused(png_header(10000, 10000))


def test_pixel_limit_is_the_option() -> None:
    assert "ImageLimits.max_pixels" in refused(encode(noisy((64, 48))), max_pixels=64 * 48 - 1)
    Picture.from_bytes(encode(noisy((64, 48))), limits=ImageLimits(max_pixels=64 * 48)).check()


def test_byte_limit(tmp_path: Path) -> None:
    data = encode(noisy())
    assert "ImageLimits.max_bytes" in refused(data, max_bytes=len(data) - 1)
    Picture.from_bytes(data, limits=ImageLimits(max_bytes=len(data))).check()
    path = tmp_path / "big.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match="big.png"):
        _ = Picture.from_path(path, limits=ImageLimits(max_bytes=100)).sha256


def test_extreme_aspect_is_refused() -> None:
    assert "51x1" in refused(encode(Image.new("RGB", (51, 1))))
    assert "1x51" in refused(encode(Image.new("RGB", (1, 51))))
    Picture.from_bytes(encode(Image.new("RGB", (50, 1)))).check()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_is_refused_unless_allowed(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert "2 frames" in refused(data)
    first = Picture.from_bytes(data, limits=ImageLimits(max_frames=2)).load()
    assert first.getpixel((4, 4)) == (255, 0, 0)


def test_camera_file_with_a_second_eye_is_one_picture() -> None:
    data = encode(noisy(), "MPO", save_all=True, append_images=[noisy()])
    Picture.from_bytes(data).check()
    assert Picture.from_bytes(data).load().size == (64, 48)


@pytest.mark.parametrize("kind", ["TIFF", "EPS", "ICO", "PPM", "PDF"])
def test_formats_outside_the_list_are_refused_whatever_their_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode(noisy(), kind))
    with pytest.raises(ImageError, match="not a picture of an allowed format") as error:
        Picture.from_path(tmp_path / "a.png").load()
    assert "a.png" in str(error.value)


def test_extension_does_not_matter_content_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(encode(noisy(), "JPEG"))
    assert Picture.from_path(tmp_path / "a.txt").load().size == (64, 48)
    assert "allowed format" in refused(encode(noisy(), "JPEG"), formats=("PNG",))


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {})]
)
def test_truncated_files_are_refused(kind: str, options: dict[str, object]) -> None:
    data = encode(noisy((200, 150)), kind, **options)
    Picture.from_bytes(data).check()
    assert "truncated" in refused(data[: len(data) // 2])


def test_header_check_sees_limits_but_not_damage() -> None:
    data = encode(noisy((200, 150)))
    Picture.from_bytes(data[: len(data) // 2]).check(full=False)
    with pytest.raises(ImageError):
        Picture.from_bytes(data, limits=ImageLimits(max_pixels=9)).check(full=False)


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"GIF89a", os.urandom(500)])
def test_rubbish_is_an_image_error(data: bytes) -> None:
    refused(data)


def test_missing_file_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="gone.png"):
        Picture.from_path(tmp_path / "gone.png").load()


def test_names_must_stay_below_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    for place in (tmp_path / "secret.png", folder / "deep" / "a.png"):
        place.write_bytes(encode(noisy()))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inner.png").symlink_to(folder / "deep" / "a.png")
    (folder / "up").symlink_to(folder / "deep")
    assert picture_below(folder, "deep/a.png").load().size == (64, 48)
    assert picture_below(folder, "deep/../deep/a.png").load().size == (64, 48)
    for name in ("../secret.png", "deep/../../secret.png", str(tmp_path / "secret.png"), "link.png"):
        with pytest.raises(ImageError, match="outside"):
            picture_below(folder, name)
    for name in ("inner.png", "up/a.png"):
        with pytest.raises(ImageError, match="link"):
            picture_below(folder, name)
    with pytest.raises(ImageError, match="outside"):
        picture_below(folder, str(folder / "deep" / "a.png"))
    for name in ("none.png", "deep", "", "a\0b"):
        with pytest.raises(ImageError, match="not a file"):
            picture_below(folder, name)


# -- what people see is what comes out


def bmp_with_alpha(alpha: int) -> bytes:
    """A 32-bit BMP with channel masks, half red and half green, every alpha byte as given."""
    rows = b"".join(bytes((0, 0, 255, alpha)) * 4 + bytes((0, 255, 0, alpha)) * 4 for _ in range(8))
    info = struct.pack("<IiiHHIIiiII", 108, 8, 8, 1, 32, 3, len(rows), 2835, 2835, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = info + masks + bytes(108 - len(info) - len(masks))
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows


def test_a_bmp_whose_alpha_was_never_set_is_opaque() -> None:
    picture = Picture.from_bytes(bmp_with_alpha(0)).load()
    assert picture.getpixel((0, 0)) == (255, 0, 0) and picture.getpixel((7, 7)) == (0, 255, 0)
    # 255 * 128/255 of red on white: half of green and blue are left
    red, green, _ = Picture.from_bytes(bmp_with_alpha(128)).load().getpixel((0, 0))
    assert red == 255 and abs(green - 127) <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "palette"])
def test_a_picture_that_flattening_would_blank_is_refused(kind: str) -> None:
    hidden = noisy()
    if kind == "palette":
        drawn = Image.new("P", (16, 16), 0)
        drawn.putpalette([255, 255, 255, 0, 0, 0])
        drawn.paste(1, (2, 2, 12, 12))
        data = encode(drawn, transparency=1)
    else:
        hidden.putalpha(0)
        data = encode(hidden, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    assert "comes out blank" in refused(data)
    words = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    words.paste((255, 255, 255, 255), (4, 4, 28, 12))  # white on nothing: seen on a dark page alone
    assert "comes out blank" in refused(encode(words))


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG")])
def test_a_picture_whose_alpha_alone_shows_something_is_refused(mode: str, kind: str) -> None:
    """White on a transparent ground of white: every colour plane is blank, and a dark page shows the box."""
    white = (255,) * (len(mode) - 1)
    drawn = Image.new(mode, (32, 32), (*white, 0))
    drawn.paste((*white, 255), (4, 4, 28, 12))
    assert "comes out blank" in refused(encode(drawn, kind, **({"lossless": True} if kind == "WEBP" else {})))


@pytest.mark.parametrize("gamma", [1, 1000, 10_000_000, 2**31 - 1])
def test_a_gamma_that_would_blank_the_picture_is_refused(gamma: int) -> None:
    drawn = Image.new("RGB", (32, 32), (120, 120, 120))
    drawn.paste((60, 60, 60), (4, 4, 28, 12))
    body = b"gAMA" + struct.pack(">I", gamma)
    chunk = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
    data = encode(drawn)
    assert "comes out blank" in refused(data[:33] + chunk + data[33:])  # 33: behind the header chunk


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_opened_animation_is_refused_like_its_file(kind: str) -> None:
    first, second = Image.new("RGB", (16, 16), "white"), noisy((16, 16))
    with Image.open(io.BytesIO(encode(first, kind, save_all=True, append_images=[second]))) as opened:
        with pytest.raises(ImageError, match="2 frames"):
            Picture.from_pil(opened)
        assert Picture.from_pil(opened, limits=ImageLimits(max_frames=2)).load().size == (16, 16)


def test_pixels_without_a_range_are_refused() -> None:
    """An array of 0..255 in 32 bits would come out black, since 16 bits are scaled down."""
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="without a fixed range"):
            Picture.from_pil(Image.new("L", (8, 8), 200).convert(mode))
    deep = Image.frombytes("I;16", (8, 8), struct.pack("<64H", *[200 * 257] * 64))
    assert Picture.from_bytes(encode(deep)).load().getpixel((0, 0)) == (200,) * 3


def test_a_picture_that_is_blank_in_truth_is_kept() -> None:
    for colour in ((0, 0, 0, 0), (255, 255, 255, 255), (9, 9, 9, 128)):
        Picture.from_bytes(encode(Image.new("RGBA", (8, 8), colour))).check()
    assert Picture.from_bytes(encode(Image.new("RGB", (8, 8), "white"))).load().getextrema() == ((255, 255),) * 3


def swapped_profile() -> bytes:
    """The profile of a display whose red and green are exchanged: sRGB with the two tags turned round."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ", 128), data.index(b"gXYZ", 128)
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_display_profile_is_applied(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    data = encode(Image.new("RGB", (16, 16), (255, 0, 0)), kind, icc_profile=swapped_profile(), **options)
    red, green, _ = Picture.from_bytes(data).load().getpixel((8, 8))
    assert red < 40 and green > 215
    for broken in (b"no profile", swapped_profile()[:200]):
        data = encode(Image.new("RGB", (16, 16), (255, 0, 0)), kind, icc_profile=broken, **options)
        assert Picture.from_bytes(data).load().getpixel((8, 8))[0] > 215


def test_the_gamma_of_a_png_is_applied() -> None:
    data = encode(Image.new("RGB", (4, 4), (64, 64, 64)))
    gamma = struct.pack(">I", 100000)  # linear light: 255 * (64/255) ** 0.45455 = 136
    chunk = struct.pack(">I", 4) + b"gAMA" + gamma + struct.pack(">I", zlib.crc32(b"gAMA" + gamma))
    assert Picture.from_bytes(data[:33] + chunk + data[33:]).load().getpixel((0, 0)) == (136, 136, 136)


def with_chunk(data: bytes, kind: bytes, body: bytes, *, at_end: bool = False, crc: int | None = None) -> bytes:
    at = len(data) - 12 if at_end else 33
    check = zlib.crc32(kind + body) if crc is None else crc
    return data[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check) + data[at:]


def test_metadata_refuses_no_picture() -> None:
    """Texts and profiles that unpack to more than Pillow takes, broken checksums, broken EXIF: the pixels are whole."""
    plain, big = encode(noisy()), zlib.compress(bytes(20_000_000))
    faulty = [with_chunk(plain, b"zTXt", b"note\0\0" + big, at_end=end) for end in (False, True)]
    faulty += [with_chunk(plain, b"iTXt", b"note\0\1\0\0\0" + big), with_chunk(plain, b"iCCP", b"p\0\0" + big)]
    faulty += [with_chunk(plain, b"tEXt", b"a\0b", crc=1), with_chunk(plain, b"pHYs", b"1"), plain + b"rest"]
    faulty += [with_chunk(plain, b"eXIf", b"MM\0*\xff\xff\xff\xff")]
    for data in faulty:
        picture = Picture.from_bytes(data)
        picture.check()
        assert picture.load().tobytes() == noisy_pixels(plain) and picture.encoded() == data
    jpeg = encode(noisy(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\0")
    Picture.from_bytes(jpeg).check()


def noisy_pixels(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return image.tobytes()


def test_a_profile_larger_than_pillow_unpacks_is_applied() -> None:
    profile = swapped_profile()
    large = struct.pack(">I", len(profile) + 3_000_000) + profile[4:] + bytes(3_000_000)
    data = with_chunk(encode(Image.new("RGB", (8, 8), (255, 0, 0))), b"iCCP", b"p\0\0" + zlib.compress(large))
    assert Picture.from_bytes(data).load().getpixel((0, 0))[1] > 215


# -- texts that are no file names, and files that are no pictures


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://example.org/a.png", "'https://example.org/a.png' is a web address: nothing is fetched; download it"),
        ("s3://bucket/a.png", "is a web address"),
        ("file:///home/a.png", "is a file: address"),
        (r"C:\pictures\a.png", "Windows drive letter"),
        (r"\\server\a.png", "Windows share"),
        ("data:image/png;base64,@@@", "is a data: address that cannot be decoded"),
        ("QUJD" * 500, "is base64 text of no picture"),
        ("a b" * 200, "too long for the name of a file"),
    ],
)
def test_what_is_no_file_name_is_named(tmp_path: Path, name: str, words: str) -> None:
    for use in (lambda: picture_of(tmp_path, name), Picture.from_path(name).load, Picture.from_path(Path(name)).load):
        with pytest.raises(ImageError) as error:
            use()
        assert len(str(error.value)) < 200
        assert words in str(error.value)


def test_pictures_written_as_text_are_decoded(tmp_path: Path) -> None:
    data = encode(noisy())
    text = base64.b64encode(data).decode()
    for written in (text, f"data:image/png;base64,{text}", f"data:;base64,{text[:40]}\n{text[40:]}"):
        assert picture_of(tmp_path, written).encoded() == data


def test_backslashes_are_read_as_slashes_where_no_file_bears_the_name(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(encode(noisy()))
    assert picture_below(tmp_path, "deep\\a.png").load().size == (64, 48)
    (tmp_path / "deep\\a.png").write_bytes(encode(noisy((8, 8))))
    assert picture_below(tmp_path, "deep\\a.png").load().size == (8, 8)
    with pytest.raises(ImageError, match="outside"):
        picture_below(tmp_path / "deep", "..\\deep\\..\\x.png")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><p>404", "web page"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic", "heic"),
        (base64.b64encode(bytes(200)), "base64"),
    ],
)
def test_a_file_that_is_no_picture_is_named_for_what_it_is(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match=f"a.png: .*: the file (is|holds) (.*){words}"):
        Picture.from_path(tmp_path / "a.png").load()
