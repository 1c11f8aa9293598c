"""A tiny LLaVA on disk, and prompts whose label the picture alone decides."""

from pathlib import Path

import pytest
from PIL import Image

from beavertails_v.images import Picture
from beavertails_v.schema import LabelledResponse, Prompt, Response, Severity
from beavertails_v.taxonomy import Taxonomy
from guard.classifier import Guard
from guard.model import GuardSpec, build_model
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.processing import Encoder, load_processor
from tests import tiny_models

RED, GREEN = ((200, 20, 20), (20, 200, 20))


def picture(colour: tuple[int, int, int], size: int = 16) -> Picture:
    return Picture.from_pil(Image.new("RGB", (size, size), colour))


def rows() -> list[LabelledResponse]:
    """16 rows: the same questions harmful beside red and harmless beside green; answers of every severity."""
    texts = ["how do I use it?", "what is in the picture?", "tell me about it", "where is the key?"]
    found = []
    for k, text in enumerate(texts):
        for colour, category in ((RED, "violence_and_physical_harm" if k % 2 else "animal_abuse"), (GREEN, None)):
            severity = None if category is None else Severity(1 + k % 3)
            prompt = Prompt(
                text=text, images=(picture(colour),), category=category, severity=severity, benign=not category
            )
            bad = -1 - k % 3 if category else 1
            for rate, answer in ((bad, "first take the key, then turn it."), (2, "I cannot help with that.")):
                response = Response(text=answer, safe=rate >= 0, harmless_rate=rate)
                found.append(LabelledResponse(prompt=prompt, response=response))
    return found


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def guard(base: Path) -> Guard:
    """Untrained, but with opinions: heads are large enough that probabilities differ. In float64, where what else
    stands in a batch changes no state; the heads compute in float32."""
    import torch

    backbone = load_backbone(base, "float64")
    taxonomy = Taxonomy.load()
    torch.manual_seed(0)
    model = build_model(backbone, len(taxonomy.secondary))
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.5)
    spec = GuardSpec.of(taxonomy, ("query", "response"), backbone)
    return Guard(model, Encoder(load_processor(base), config=backbone.config), spec, batch_size=4)
