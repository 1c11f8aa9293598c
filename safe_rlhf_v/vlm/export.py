"""A trained folder as one whole model in transformers' own format, for those who do not have this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safe_rlhf_v.vlm.backbone import load_backbone, to_dtype
from safe_rlhf_v.vlm.heads import DESCRIPTION_FILE, HeadedModel, load_heads, read_description, save_heads
from safe_rlhf_v.vlm.kind import SCORERS, kind_of
from safe_rlhf_v.vlm.processing import load_processor
from safe_rlhf_v.vlm.source import ModelError


def export_model(source: str | Path, output: Path, dtype: str = "float32") -> None:
    """Merge the adapters of `source` in float32, round once to `dtype`, and write model and processor to `output`.

    source: a stage's folder, a PEFT adapter with its processor, a model folder or a hub id. The result loads with
    AutoModelForImageTextToText and AutoProcessor. A reward or cost model keeps its head, in float32, for `HeadedModel`.
    Raises ModelError for a guard, whose calibration belongs to the weights as they are.
    """
    if (Path(source) / "guard.json").is_file():
        raise ModelError(f"{source} is a guard: it is used as it is, by Guard.from_pretrained and `guard check`")
    processor = load_processor(source)
    backbone = load_backbone(source)
    backbone.to(dtype=to_dtype(dtype)).save_pretrained(output)
    processor.save_pretrained(output)
    if (Path(source) / DESCRIPTION_FILE).is_file():
        _copy_heads(Path(source), output, backbone)


def _copy_heads(source: Path, output: Path, backbone: Any) -> None:
    description = read_description(source)
    model = HeadedModel(backbone, description["heads"], bias=description["bias"])
    model.heads.load_state_dict(load_heads(source, description))
    kind = kind_of(source)
    save_heads(model.heads, output, backbone, bias=model.bias, kind=kind if kind in SCORERS else None)
