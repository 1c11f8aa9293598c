"""Models that answer and models that score, from their folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from beavertails_v import Prompt
from guard.items import pictures_of, text_of
from guard.model import control_tokens
from guard.text import Neutraliser
from safe_rlhf_v.config import DataSection, GenerationSection, ModelSection
from safe_rlhf_v.console import console, plain
from safe_rlhf_v.generation import Sampling, TransformersEngine
from safe_rlhf_v.stages.data import comparisons
from safe_rlhf_v.stages.models import device
from safe_rlhf_v.training.encode import dropped, encodable, listing, thorough, write_left_out
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import encode_images, load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.kind import require_answering
from safe_rlhf_v.vlm.processing import Encoder, load_processor

if TYPE_CHECKING:
    from guard.classifier import Guard
    from guard.regenerate import Transcript


class Answering:
    """A model that answers prompts, as the generation section says; an Engine that encodes each picture once."""

    def __init__(self, path: str | Path, model: ModelSection, generation: GenerationSection) -> None:
        require_answering(path)
        self.model = load_backbone(path, dtype=model.dtype, attn_implementation=model.attn_implementation)
        self.model.to(device())
        self.encoder = Encoder(load_processor(path), model.max_prompt_length, config=self.model.config)
        self.engine = TransformersEngine(self.model, self.encoder)
        self.sampling = generation.made()
        self.batch_size = generation.batch_size

    def generate(self, inputs: Inputs, samples: int, sampling: Sampling) -> Responses:
        return self.engine.generate(encode_images(self.model, inputs), samples, sampling)

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        """One answer a prompt, in order."""
        texts: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            inputs = self.encoder.prompts(prompts[start : start + self.batch_size])
            texts += self.encoder.decode(self.generate(inputs, 1, self.sampling))
        return texts


class Scoring:
    """The trained reward and cost model: (prompts, texts) -> (rewards, costs), cost > 0 unsafe."""

    def __init__(self, reward: str | Path, cost: str | Path, model: ModelSection, batch_size: int) -> None:
        load = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
        self.models = [HeadedModel.from_pretrained(path, **load).to(device()) for path in (reward, cost)]
        self.encoder = Encoder(load_processor(reward), config=self.models[0].backbone.config)
        self.harmless = Neutraliser(control_tokens(self.encoder))  # an answer may spell a special token in letters
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], list[float]]:
        found: tuple[list[float], list[float]] = ([], [])
        for start in range(0, len(texts), self.batch_size):
            inputs = self.encoder.prompts(prompts[start : start + self.batch_size])
            responses = self.encoder.responses([self.harmless(t) for t in texts[start : start + self.batch_size]])
            for scores, model in zip(found, self.models, strict=True):
                features = encode_images(model.backbone, inputs)
                scores += model(features, responses)["score"].squeeze(-1).tolist()
        return found


def one_prompt(text: str, images: Sequence[str | Path]) -> Prompt:
    """A prompt of a question and picture files.

    Raises ImageError for a file that is no picture within limits, ContentError for an address and for what is no text.
    """
    pictures = pictures_of(list(images))
    for picture in pictures:
        picture.load()
    return Prompt(text=text_of(text, "prompt"), images=pictures)


def answer_one(
    path: str, text: str, images: Sequence[str | Path], model: ModelSection, generation: GenerationSection, seed: int
) -> str:
    """One answer of the model at `path` to one question."""
    prompt = one_prompt(text, images)
    torch.manual_seed(seed)
    return Answering(path, model, generation)([prompt])[0]


def answer_split(
    path: str, output: Path, data: DataSection, model: ModelSection, generation: GenerationSection, seed: int
) -> int:
    """Answers to every prompt of the evaluation split, one JSON object a line; returns how many."""
    require_answering(path)
    pairs = comparisons(data, "evaluation")
    answering = Answering(path, model, generation)
    beside = output.with_suffix(".left_out.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    with listing(beside):
        prompts, left_out = encodable(pairs.prompts(), thorough(answering.encoder), pairs)
    if left_out := [*dropped(pairs), *left_out]:
        write_left_out(beside, left_out)
        plain(f"{len(left_out)} rows left out, see {beside}")
    torch.manual_seed(seed)
    with output.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for start in track(range(0, len(prompts), answering.batch_size), description="answering"):
            batch = prompts[start : start + answering.batch_size]
            for prompt, text in zip(batch, answering(batch), strict=True):
                row: dict[str, Any] = {"prompt_id": prompt.id, "question": prompt.text, "response": text}
                file.write(json.dumps(row | {"category": prompt.category}, ensure_ascii=False) + "\n")
    return len(prompts)


def regenerate_one(
    judge: Guard, path: str, prompt: Prompt, rounds: int, model: ModelSection, generation: GenerationSection, seed: int
) -> Transcript:
    """One answer through the guard; where the guard cannot judge questions, only answers are judged."""
    from guard.regenerate import GenerativePolicy, regenerate

    answering = Answering(path, model, generation)
    torch.manual_seed(seed)
    policy = GenerativePolicy(answering, answering.encoder, answering.sampling, answering.batch_size)
    return regenerate(policy, judge, [prompt], rounds, judge_query=judge.can_judge("query"))[0]


def show_attempts(transcript: Transcript) -> None:
    """A row an attempt, the question's own verdict first."""
    table = Table("attempt", "action", "unsafe", "severity", "reason", "text", title="attempts", title_justify="left")
    tried = [("question", transcript.query_verdict, transcript.prompt.text)]
    tried += [(str(k), attempt.verdict, attempt.text) for k, attempt in enumerate(transcript.attempts, 1)]
    for name, verdict, text in tried:
        if verdict is not None:
            severity, unsafe = verdict.severity.name.lower(), f"{verdict.unsafe_probability:.3f}"
            table.add_row(name, verdict.action, unsafe, severity, escape(verdict.reason), escape(text))
    console.print(table)
