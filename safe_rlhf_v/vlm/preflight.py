"""What can be known of a model before data are loaded and weights are read: that it can be prompted and is whole."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from beavertails_v.images import Picture
from beavertails_v.schema import Prompt
from safe_rlhf_v.vlm.backbone import chain, require_fitting
from safe_rlhf_v.vlm.generation_config import require_generation_config
from safe_rlhf_v.vlm.processing import Encoder, load_processor
from safe_rlhf_v.vlm.source import ModelError
from safe_rlhf_v.vlm.weights import weight_shapes

QUESTION = "what is this ?"


def preflight(path: str | Path, prompt: Prompt | None = None) -> Encoder:
    """Loads the processor, renders a prompt and reads the headers of the weights; returns the encoder.

    prompt: one of the data, that is rendered beside a question about a grey picture. Raises ModelError for weights that
    are not whole or of another shape than config.json says, a processor or chat template that is missing, broken or
    drops the question, tokens beyond the embedding, and a generation_config.json that cannot be used.
    """
    shapes: dict[str, list[int]] = {}
    for folder in (folders := chain(path)):
        shapes |= weight_shapes(folder)
    require_fitting(folders[-1], shapes)
    require_generation_config(folders[-1])
    encoder = Encoder(load_processor(path))
    if QUESTION not in encoder.render(Prompt(text=QUESTION, images=(Picture.from_pil(Image.new("RGB", (64, 64))),))):
        raise ModelError(
            f"{path}: what its chat template makes of a prompt lacks the question; copy chat_template.jinja from the "
            "model it was made of"
        )
    if prompt is not None:
        encoder.render(prompt)
    rows = [shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    last = max(encoder.tokenizer.get_vocab().values())
    if rows and last >= max(rows):
        raise ModelError(
            f"{path}: its tokenizer goes to id {last}, and its embedding has {max(rows)} rows: they are not of one "
            "model; copy the tokenizer of the model it was made of, or resize the embedding"
        )
    return encoder
