"""What stands in a model's generation_config.json: wrong values found before weights are read, not at the first answer.

Of it only the ids that end a response are used; all else comes from the run's settings. The rest is saved again beside
what was trained, where transformers refuses some of what it took at loading: after hours of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from safe_rlhf_v.vlm.source import ModelError
from safe_rlhf_v.vlm.weights import DamagedFile, read_json

FILE = "generation_config.json"
LISTS = ("eos_token_id", "forced_eos_token_id", "decoder_start_token_id")  # one id or several
FLAGS = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "return_dict_in_generate")
WHOLE = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k",
    "no_repeat_ngram_size",
)  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")
NUMBERS = (*SAMPLING, "repetition_penalty", "length_penalty", "guidance_scale")


def require_generation_config(folder: str | Path) -> None:
    """Raises ModelError where a local model's generation_config.json is no JSON or holds a value of a wrong kind."""
    file = Path(folder) / FILE
    if not file.is_file():
        return
    advice = "copy it from the model it was made of, or delete it"
    try:
        values = read_json(file)
    except DamagedFile as error:
        raise ModelError(f"{error}: {advice}") from None
    if not isinstance(values, Mapping):
        raise ModelError(f"{file} should hold a JSON object of settings: {advice}")
    for name, value in values.items():
        if wanted := _wanted(name, value):
            raise ModelError(f"{file}: {name} = {value!r} should be {wanted}; correct it")
    try:
        savable(GenerationConfig.from_dict(dict(values))).validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: {' '.join(str(error).split())[:300]}; correct it, or delete the file") from None


def savable(config: GenerationConfig) -> GenerationConfig:
    """The same settings without those of no effect: of sampling, beams and outputs not asked for, an id below 0."""
    unused: tuple[str, ...] = () if config.do_sample else SAMPLING
    unused += () if (config.num_beams or 1) > 1 else BEAMS
    unused += () if config.return_dict_in_generate else tuple(config.extra_output_flags)
    for name in unused:
        setattr(config, name, None)
    if config.pad_token_id is not None and config.pad_token_id < 0:
        config.pad_token_id = None
    return config


def _wanted(name: str, value: Any) -> str | None:
    """What a value should be, where it is something else."""
    if value is None:
        return None
    if name in LISTS:
        ids = value if isinstance(value, list) else [value]
        return None if all(map(_whole, ids)) else "the id of a token, or a list of ids"
    if name.endswith("_token_id"):
        return None if _whole(value) else "the id of a token"
    if name in WHOLE:
        return None if _whole(value) else "a whole number"
    if name in FLAGS:
        return None if isinstance(value, bool) else "true or false"
    return None if name not in NUMBERS or _whole(value) or isinstance(value, float) else "a number"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
