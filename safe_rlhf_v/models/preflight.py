"""What can be known of a model before data are loaded and weights are read: that it can be prompted and is whole."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from beavertails_v.images import Picture
from beavertails_v.schema import Prompt
from safe_rlhf_v.models.backbone import chain
from safe_rlhf_v.models.processing import Encoder, load_processor
from safe_rlhf_v.models.source import ModelError
from safe_rlhf_v.models.weights import weight_shapes


def preflight(path: str | Path, prompt: Prompt | None = None) -> Encoder:
    """Loads the processor, renders a prompt and reads the headers of the weights; returns the encoder.

    prompt: one of the data; without it, a question about a grey picture. Raises ModelError for weights that are not
    whole, a processor or chat template that is missing or broken, and tokens beyond the embedding.
    """
    shapes: dict[str, list[int]] = {}
    for folder in chain(path):
        shapes |= weight_shapes(folder)
    encoder = Encoder(load_processor(path))
    encoder.render(prompt or Prompt(text="what is this ?", images=(Picture.from_pil(Image.new("RGB", (64, 64))),)))
    rows = [shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    last = max(encoder.tokenizer.get_vocab().values())
    if rows and last >= max(rows):
        raise ModelError(
            f"{path}: its tokenizer goes to id {last}, and its embedding has {max(rows)} rows: they are not of one "
            "model; copy the tokenizer of the model it was made of, or resize the embedding"
        )
    return encoder
