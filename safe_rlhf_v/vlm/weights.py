"""Whether files of weights and states are whole, by their first and last bytes: no tensor is read.

A safetensors file begins with 8 bytes, the length of the JSON that follows, and that JSON says where its last byte
stands; torch's files are zip archives, whose directory stands at the end.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from beavertails_v.errors import UserError
from safe_rlhf_v.vlm.source import ModelError

POINTER = b"version https://git-lfs"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
CUT = "is cut short: copy or fetch it again"


class DamagedFile(UserError, ValueError):
    """A file is not what was once written. The message names it and says what is wrong with it."""


def header(file: Path) -> dict[str, Any]:
    """Name to {"dtype", "shape", "data_offsets"} of a safetensors file. Raises DamagedFile."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if first and POINTER.startswith(first):
            raise DamagedFile(f"{file} is a git-lfs pointer, not the weights: git lfs pull")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > size - 8:
            raise DamagedFile(f"{file} {CUT if size else 'is empty: copy or fetch it again'}")
        try:
            found: dict[str, Any] = json.loads(stream.read(length))
            found.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in found.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DamagedFile(f"{file} is damaged: its header cannot be read; copy or fetch it again") from None
    if size < 8 + length + end:
        raise DamagedFile(f"{file} {CUT} ({size:,} of {8 + length + end:,} bytes are there)")
    return found


def require_complete(file: Path) -> None:
    """Raises DamagedFile for a file that is missing, cut, a pointer or no JSON, as its suffix demands."""
    if not file.is_file():
        raise DamagedFile(f"{file} is missing")
    if file.suffix == ".safetensors":
        header(file)
    elif file.suffix in (".pt", ".pth", ".bin"):
        _require_archive(file)
    elif file.suffix == ".json":
        read_json(file)


def _require_archive(file: Path) -> None:
    """Of torch's files: zip archives, or pickles as they were before."""
    with file.open("rb") as stream:
        first = stream.read(len(POINTER))
    if first == POINTER:
        raise DamagedFile(f"{file} is a git-lfs pointer, not the weights: git lfs pull")
    if not first.startswith(b"\x80") and not zipfile.is_zipfile(file):
        raise DamagedFile(f"{file} {CUT if first.startswith(b'PK') else 'is damaged: copy or fetch it again'}")


def read_json(file: Path) -> Any:
    """The values of a JSON file. Raises DamagedFile where it holds none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        why = "is empty, as after a power cut" if not file.stat().st_size else f"is no JSON ({error})"
        raise DamagedFile(f"{file} {why}") from None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises DamagedFile."""
    header(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise DamagedFile(f"{file} is damaged ({error}): copy or fetch it again") from None


def read_torch(file: Path, **options: Any) -> Any:
    """What torch.save wrote of tensors and plain values, on the CPU. Raises DamagedFile."""
    require_complete(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, **options)
    except (RuntimeError, EOFError, OSError, UnpicklingError) as error:
        why = str(error).partition("\n")[0]
        raise DamagedFile(f"{file} is damaged ({why})") from None


def damage(folder: Path) -> str | None:
    """What is wrong with a folder of states and weights, naming the file; None where all its files are whole."""
    for file in sorted(folder.iterdir()):
        try:
            if file.is_file():
                require_complete(file)
        except DamagedFile as error:
            return str(error)
    return None


def weight_shapes(folder: str | Path) -> dict[str, list[int]]:
    """Name to shape of all weights in a local model folder; {} where there are none, or none with a header.

    Raises ModelError naming the file that is a pointer, cut, damaged, or missing though an index names it.
    """
    shapes: dict[str, list[int]] = {}
    try:
        for file in weight_files(Path(folder)):
            require_complete(file)
            if file.suffix == ".safetensors":
                shapes |= {name: tensor["shape"] for name, tensor in header(file).items()}
    except DamagedFile as error:
        raise ModelError(str(error)) from None
    return shapes


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers would read. Raises DamagedFile where an index names what is not there."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
    for index in (folder / name for name in INDEXES):
        if index.is_file():
            return _indexed(index, read_json(index))
    return sorted(folder.glob("*.safetensors"))


def _indexed(index: Path, content: Any) -> list[Path]:
    if not isinstance(content, Mapping) or not isinstance(content.get("weight_map"), Mapping):
        raise DamagedFile(f"{index} has no weight_map: copy or fetch it again")
    files = [index.parent / str(name) for name in sorted(set(content["weight_map"].values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DamagedFile(
            f"{index.parent} lacks {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}, which {index.name} names: "
            "copy or fetch them"
        )
    return files
