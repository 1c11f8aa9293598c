"""Words that a word-level model lacks: "score", "7", ... A model with subwords knows them and stays as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken

from safe_rlhf_v.refinement.formats import Format, format_for, unknown_words
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.processing import load_processor


def teacher_words(form: Format) -> str:
    """Every word of a teacher's reply that is not feedback."""
    return " ".join(form.score.format(score=score, feedback="") for score in range(1, 11))


def with_words(base: str | Path, text: str, folder: str | Path) -> str:
    """`base`, or where its tokenizer lacks words of `text` a copy in `folder` that has them, with fresh embeddings."""
    processor = load_processor(base)
    missing = unknown_words(processor.tokenizer, text)
    if not missing:
        return str(base)
    model = load_backbone(base)
    processor.tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in missing])
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same new embeddings every time: a killed training goes on from its own base
        model.resize_token_embeddings(len(processor.tokenizer))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def format_of(path: str | Path) -> Format:
    """The format that the model at `path` can read."""
    return format_for(load_processor(path).tokenizer)
