"""What the worker processes hold: the guard, or a model that answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from beavertails_v.images import Picture
from guard.classifier import Guard
from guard.golden import self_test
from guard.items import prompt_of
from guard.model import weights_hash


@dataclass(frozen=True, slots=True)
class Item:
    """What is judged at once: a question with its pictures, or with `response` an answer to it."""

    text: str
    pictures: tuple[Picture, ...] = ()
    response: str | None = None

    @property
    def kind(self) -> Any:
        return "query" if self.response is None else "response"

    def key(self) -> bytes:
        """Digest of the content: of texts and of the pictures' bytes."""
        digest = hashlib.sha256()
        for part in (self.text, "" if self.response is None else "r" + self.response):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        for picture in self.pictures:
            digest.update(bytes.fromhex(picture.sha256))
        return digest.digest()


@dataclass(frozen=True)
class MakeGuard:
    """Loads the guard and tests it; picklable."""

    folder: str
    policy: str | None = None
    device: str | None = None
    batch_size: int = 16
    picture_cache: int = 256 * 2**20

    def __call__(self) -> GuardWork:
        return GuardWork(self)


class GuardWork:
    """Verdicts of items, in order."""

    def __init__(self, made_of: MakeGuard) -> None:
        device = made_of.device or ("cuda" if torch.cuda.is_available() else None)
        self.guard = Guard.from_pretrained(
            made_of.folder, policy=made_of.policy, device=device, batch_size=made_of.batch_size
        )
        self.guard.keep_pictures(made_of.picture_cache)
        spec = self.guard.spec
        self.info: Mapping[str, Any] = {
            "golden": self_test(self.guard, Path(made_of.folder)),
            "kinds": spec.kinds,
            "categories": spec.categories,
            "taxonomy": f"{spec.taxonomy} {spec.taxonomy_version}",
            "weights": weights_hash(self.guard.model),
            "calibration_id": self.guard.calibration.id,
            "policy": self.guard.policy.name,
            "refusal": self.guard.policy.refusal,
            "category_threshold": {
                "query": self.guard.policy.query.category_threshold,
                "response": self.guard.policy.response.category_threshold,
            },
        }

    def __call__(self, payloads: Sequence[Item]) -> tuple[list[Any], Mapping[str, float]]:
        prompts = [partial(prompt_of, item.pictures, item.text) for item in payloads]
        verdicts, encoding, forward = self.guard.judge_timed(prompts, [item.response for item in payloads])
        return verdicts, {"encoding": encoding, "forward": forward}


@dataclass(frozen=True)
class MakePolicy:
    """Loads a model that answers; picklable."""

    folder: str
    dtype: str = "float32"

    def __call__(self) -> PolicyWork:
        return PolicyWork(self)


@dataclass(frozen=True, slots=True)
class Ask:
    """A question to the local policy."""

    text: str
    pictures: tuple[Picture, ...]
    max_tokens: int
    temperature: float
    top_p: float


class PolicyWork:
    """(text, generated tokens, whether it ended by itself) of each question, in order; alike settings together."""

    def __init__(self, made_of: MakePolicy) -> None:
        from safe_rlhf_v.generation import TransformersEngine
        from safe_rlhf_v.vlm.backbone import load_backbone
        from safe_rlhf_v.vlm.kind import require_answering
        from safe_rlhf_v.vlm.processing import Encoder, load_processor

        require_answering(made_of.folder, "--policy")
        self.model = load_backbone(made_of.folder, dtype=made_of.dtype)
        if torch.cuda.is_available():
            self.model.to("cuda")
        self.encoder = Encoder(load_processor(made_of.folder), config=self.model.config)
        self.engine = TransformersEngine(self.model, self.encoder)
        self.info: Mapping[str, Any] = {"policy": made_of.folder}

    def __call__(self, payloads: Sequence[Ask]) -> tuple[list[Any], Mapping[str, float]]:
        found: list[Any] = [None] * len(payloads)
        alike: dict[tuple[int, float, float], list[int]] = {}
        for i, ask in enumerate(payloads):
            alike.setdefault((ask.max_tokens, ask.temperature, ask.top_p), []).append(i)
        for (most, temperature, top_p), places in alike.items():
            for i, result in zip(places, self._answers([payloads[i] for i in places], most, temperature, top_p)):
                found[i] = result
        return found, {}

    def _answers(self, asked: Sequence[Ask], most: int, temperature: float, top_p: float) -> list[Any]:
        from safe_rlhf_v.generation import Sampling
        from safe_rlhf_v.vlm.backbone import encode_images

        inputs = self.encoder.prompts([prompt_of(ask.pictures, ask.text) for ask in asked])
        sampling = Sampling(max_new_tokens=most, temperature=temperature, top_p=top_p)
        responses = self.engine.generate(encode_images(self.model, inputs), 1, sampling)
        counts = responses.mask.sum(1).tolist()
        texts = self.encoder.decode(responses)
        return [(text, count, count < most) for text, count in zip(texts, counts, strict=True)]
