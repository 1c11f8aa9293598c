"""What is wrong with a model's folder or hub id, in one sentence that names it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import ProcessorMixin

from beavertails_v.errors import UserError

MODEL = ("config.json", "adapter_config.json")  # any one marks a folder as a model's
PROCESSOR = (*MODEL, "processor_config.json", "preprocessor_config.json")  # or as one that holds a processor


TRUST = "SAFE_RLHF_V_TRUST_REMOTE_CODE"
# what reading a user's files raises: of the system, of a damaged JSON or text (ValueError), of values of another kind
FAULTS = (
    OSError, ValueError, TypeError, ImportError, KeyError, AttributeError, RuntimeError, SafetensorError, TemplateError,
    StrictDataclassError,
)  # fmt: skip


class ModelError(UserError, ValueError):
    """A model cannot be used. The message names the folder or hub id and what to do."""


@contextmanager
def reading(path: str | Path, lacks: str, marks: Sequence[str] = MODEL) -> Iterator[None]:
    """Around what transformers reads from `path`: its many errors as one.

    lacks: what to say of a folder that does not load. marks: files of which a folder needs one.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in marks):
        raise ModelError(f"{path}: holds no config.json, so it is no model in transformers' format")
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except FAULTS as error:  # whichever of its parts fails first
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        if package := missing_package(error):
            raise ModelError(f"{path}: needs the package {package}: pip install {package}") from error
        if "trust_remote_code" in str(error) and not trust_remote_code():
            raise ModelError(
                f"{path}: brings Python code of its own, which would run on this machine; read it, then set the "
                f"environment variable {TRUST}=1 ({why})"
            ) from error
        if folder.exists():
            raise ModelError(f"{path}: {lacks} ({why})") from error
        raise ModelError(f"{path}: no such folder, and not to be had from the hub ({why})") from error


def missing_package(error: BaseException) -> str | None:
    """The package that an ImportError asks for: by its name, or as transformers words it; None of any other error."""
    if not isinstance(error, ImportError):
        return None
    if error.name and "cannot import name" not in str(error):
        return error.name.partition(".")[0]
    words = re.search(r"pip install ([\w.-]+)|requires the ([\w.-]+) library", str(error))
    return (words[1] or words[2].lower()) if words else None


def is_model(folder: Path) -> bool:
    """Whether it is a folder that holds a model or an adapter."""
    return any((folder / name).is_file() for name in MODEL)


def trust_remote_code() -> bool:
    """Whether models may bring Python code of their own: all of this process, their bases and processors too.

    The environment says so, not settings: those files travel.
    """
    return os.environ.get(TRUST) == "1"


def require_processor(processor: object, path: str | Path) -> None:
    """Raises ModelError for a tokenizer alone, which is what transformers gives where the rest is missing."""
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"{path}: {NO_PROCESSOR}")


NO_PROCESSOR = (
    "has no processor: copy processor_config.json or preprocessor_config.json, and the tokenizer's files, from the "
    "model it was made of"
)
