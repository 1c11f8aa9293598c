from pathlib import Path

import torch

from beavertails_v import Prompt
from beavertails_v.picture_world import vocabulary
from safe_rlhf_v.demo.tiny import tiny_llava
from safe_rlhf_v.refinement.formats import WORDS, unknown_words
from safe_rlhf_v.refinement.vocabulary import format_of, teacher_words, with_words
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.processing import Encoder, load_processor


def test_a_word_level_model_learns_the_words_of_scores(tmp_path: Path) -> None:
    model, processor = tiny_llava(vocabulary(), hidden_size=16, layers=1, vision_layers=1, heads=2)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    assert format_of(tmp_path / "base") is WORDS
    words = teacher_words(WORDS)
    assert set(unknown_words(processor.tokenizer, words)) == {"score", "feedback", *map(str, range(1, 11))}

    grown = with_words(tmp_path / "base", words, tmp_path / "grown")
    encoder = Encoder(load_processor(grown))
    text = "score : 10 feedback : it is not red ."
    row = encoder.responses([text])
    assert row.ids.shape == (1, 11)  # ten words and the end: 10 is one token
    assert encoder.decode(row) == [text]

    before, after = load_backbone(tmp_path / "base"), load_backbone(grown)
    old = before.get_input_embeddings().weight
    assert torch.equal(after.get_input_embeddings().weight[: len(old)], old)
    assert len(after.get_input_embeddings().weight) == len(old) + 12
    prompt = Prompt(text="what is this ?")
    assert torch.equal(encoder.prompts([prompt]).input_ids, Encoder(processor).prompts([prompt]).input_ids)
    twin = load_backbone(with_words(tmp_path / "base", words, tmp_path / "twin"))
    assert torch.equal(after.get_input_embeddings().weight, twin.get_input_embeddings().weight)
    assert with_words(grown, words, tmp_path / "again") == grown  # nothing is missing: nothing is made
    assert not (tmp_path / "again").exists()
