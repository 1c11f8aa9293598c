"""`safe-rlhf-v init`: the settings files that the package carries, as files of one's own."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from safe_rlhf_v.config_io import SettingsError
from safe_rlhf_v.files import replace_text


def write_recipes(folder: Path) -> list[Path]:
    """Writes every recipe below `folder`; those of accelerate fit this machine. Raises SettingsError, before it writes
    anything, where one of them is there already.
    """
    with resources.as_file(resources.files("safe_rlhf_v") / "recipes") as recipes:
        texts = {p.relative_to(recipes): p.read_text(encoding="utf-8") for p in sorted(recipes.rglob("*.yaml"))}
    if there := [name for name in texts if (folder / name).exists()]:
        raise SettingsError(f"{folder / there[0]} is there already; name another folder: safe-rlhf-v init FOLDER")
    gpus = _gpus()
    for name, text in texts.items():
        own = text.replace("configs/", f"{folder.as_posix()}/")
        replace_text(folder / name, fitted(own, gpus) if name.parts[0] == "accelerate" else own)
    return [folder / name for name in texts]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def fitted(text: str, gpus: int) -> str:
    """An accelerate file of one machine for its number of GPUs; without any, ddp runs two processes on the CPU."""
    if "num_machines: 1\n" not in text:
        return text
    if gpus:
        return re.sub(r"(?m)^num_processes: \w+", f"num_processes: {gpus}", text)
    if "distributed_type: MULTI_GPU" not in text:  # which is also how accelerate starts several processes on a CPU
        return text
    return re.sub(r"(?m)^num_processes: \w+", "num_processes: 2", text).replace("use_cpu: false", "use_cpu: true")
