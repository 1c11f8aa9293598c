"""What a text in a picture column is: a file name, or something else, named for what it is."""

from __future__ import annotations

import base64
import binascii
import os
import re
from pathlib import Path

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)  # a path object takes one of two slashes away
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{32,}={0,2}\s*")
_DATA = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?P<more>(?:;[^,;]*)*),(?P<body>.*)", re.DOTALL | re.IGNORECASE)
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF")
#: What the bytes of a file that is no picture of ours begin with, and what to do.
_BEGINNINGS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the picture; run `git lfs pull` in its repository"),
    (b"%pdf", "is a PDF document; save the page as PNG"),
    (b"<svg", "is an SVG drawing; export it as PNG"),
    (b"<?xml", "is an XML or SVG text; export the drawing as PNG"),
    (b"<!doctype html", "is a web page, such as a failed download leaves; download the picture itself"),
    (b"<html", "is a web page, such as a failed download leaves; download the picture itself"),
    (b"data:", "holds a data: address as text; decode it and write the bytes"),
    (b"pk\x03\x04", "is a zip archive; unpack it"),
    (b"\x93numpy", "is a NumPy array; save it as PNG"),
    (b"\x1f\x8b", "is compressed by gzip; unpack it"),
)


def short(text: str, most: int = 60) -> str:
    """The text in at most `most` characters, the middle left out."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def written_bytes(text: str) -> bytes | None:
    """The picture's bytes where the text holds them: a data: address, or base64 of a picture; else None."""
    if found := _DATA.fullmatch(text.strip()):
        return _decoded(found["body"]) if ";base64" in found["more"].lower() else None
    if len(text) >= 32 and _BASE64.fullmatch("".join(text.splitlines())):
        data = _decoded(text)
        return data if data is not None and data.startswith(_SIGNATURES) else None
    return None


def _decoded(text: str) -> bytes | None:
    text = "".join(text.splitlines()).replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        return None


def not_a_name(text: str) -> str | None:
    """What the text is where it is no file name, and what to do; None where it may be one."""
    if text[:5].lower() == "data:":
        return f"{short(text)!r} is a data: address that cannot be decoded; give base64 of the file, or a file name"
    if _DRIVE.match(text):
        return f"{short(text)!r} is a path with a Windows drive letter; copy the file and name it from the folder"
    if found := _ADDRESS.fullmatch(text):
        if found[1].lower() == "file":
            return f"{short(text)!r} is a file: address; give the path alone"
        address = short(f"{found[1]}://{found[2]}")
        return f"{address!r} is a web address: nothing is fetched; download it first and give the file"
    if text.startswith("\\\\"):
        return f"{short(text)!r} is a path of a Windows share; copy the file and name it relative to the folder"
    if len(text) >= 200 and _BASE64.fullmatch("".join(text.splitlines())):
        return f"{short(text)!r} is base64 text of no picture; write base64 of a PNG or JPEG, or a file name"
    if max(len(part.encode(errors="replace")) for part in text.split("/")) > 255:
        return f"{short(text)!r} is too long for the name of a file"
    return None


def kind_of_file(data: bytes) -> str | None:
    """What a file that is no picture is, by its first bytes, and what to do; None where that is not known."""
    head = data[:200].lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginning, words in _BEGINNINGS:
        if head.lower().startswith(beginning):
            return words
    if data[4:8] == b"ftyp":
        return f"is a {data[8:12].decode('latin-1').strip()} file (HEIC, AVIF or video); save it as JPEG or PNG"
    if len(head) >= 64 and (_BASE64.fullmatch(head.decode("latin-1").strip())):
        return "holds base64 text; decode it and write the bytes"
    return None


def local_name(folder: Path, name: str) -> str:
    """The name as it is, or with slashes for backslashes where no file bears the name itself."""
    return name if "\\" not in name or os.path.exists(folder / name) else name.replace("\\", "/")
