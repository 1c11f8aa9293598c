"""One vision-language backbone with heads: a query or a response is judged in one forward, without generating a word.

A query is the encoded prompt alone; a response is the prompt and the response's tokens. The heads read the state of the
last attended token: unsafe (two logits, one for queries and one for responses), severity (three, see `guard.losses`)
and one logit a category.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from beavertails_v.errors import UserError
from beavertails_v.schema import Prompt, Severity
from guard.calibration import Calibration, scaled
from guard.items import FAULTS, ImageLike, ItemError, prompt_of, shortened, text_of
from guard.losses import severity_at_least, severity_probabilities
from guard.model import GuardModel, GuardSpec, control_tokens, weights_hash
from guard.policy import Policy
from guard.text import Neutraliser, readings, unread
from guard.types import Kind, Verdict, fail_closed
from safe_rlhf_v.types import Inputs, Responses
from safe_rlhf_v.vlm.backbone import encode_images
from safe_rlhf_v.vlm.image_features import VisionCache
from safe_rlhf_v.vlm.processing import Encoder, collate, load_processor, stack_responses
from safe_rlhf_v.vlm.weights import DamagedFile, read_json

log = logging.getLogger(__name__)
SPEC_FILE, CALIBRATION_FILE, POLICY_FILE = "guard.json", "calibration.json", "policy.yaml"
OnError = Literal["raise", "refuse"]


class UntrainedKindError(UserError, ValueError):
    """The guard was asked to judge a kind (queries, responses) that it had no labels to learn."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One reading of item `item`, encoded: a prompt (1, P) and a response's token ids, or None for a query."""

    item: int
    inputs: Inputs
    response: list[int] | None

    @property
    def length(self) -> int:
        return self.inputs.input_ids.shape[1] + len(self.response or ())


class Guard:
    """Judges queries and responses.

    model: as `guard.model.build_model` makes it. policy: which probability leads to which action (the shipped one).
    calibration: default none, so raw probabilities. batch_size: rows a forward. picture_cache: bytes of image features
    kept, so that several answers to one picture encode it once.
    """

    grades: bool = True  # severity and categories are its own answers, not made of P(unsafe)

    def __init__(
        self,
        model: GuardModel,
        encoder: Encoder,
        spec: GuardSpec,
        policy: Policy | None = None,
        calibration: Calibration | None = None,
        *,
        batch_size: int = 16,
        picture_cache: int = 256 * 2**20,
    ) -> None:
        self.model, self.encoder, self.spec = model.eval(), encoder, spec
        self.policy = Policy.load() if policy is None else policy
        self.policy.check_categories(spec.categories)
        self.calibration = Calibration() if calibration is None else calibration
        tuned_for = (self.policy.tuned or {}).get("calibration_id", self.calibration.id)
        if tuned_for != self.calibration.id:
            log.warning(
                "policy %s was tuned for another guard (calibration %s): tune it anew", self.policy.name, tuned_for
            )
        self.batch_size = batch_size
        self.neutralise = Neutraliser(control_tokens(encoder))
        self._pictures = VisionCache(picture_cache)

    def moderate(
        self,
        image: ImageLike | Sequence[ImageLike] | None,
        text: str,
        response: str | None = None,
        on_error: OnError = "raise",
    ) -> Verdict:
        """Judge a query, or with `response` the response to it. image: a picture in any form, several, or None.

        text may be empty beside a picture. Raises ImageError, EncodingError, SchemaError or ContentError, which the
        content causes, and UntrainedKindError; on_error="refuse" turns the former into a verdict that fails closed.
        """
        try:
            return self.moderate_batch([image], [text], [response], on_error)[0]
        except ItemError as error:  # there is one item: its place says nothing
            raise error.fault from None

    def moderate_batch(
        self,
        images: Sequence[ImageLike | Sequence[ImageLike] | None],
        texts: Sequence[str],
        responses: Sequence[str | None] | None = None,
        on_error: OnError = "raise",
    ) -> list[Verdict]:
        """`moderate` of many at once, in order; the three sequences are of equal length.

        Raises ItemError, which names the first item whose content is at fault; with on_error="refuse" each of these
        has the verdict that fails closed, and the others are judged as ever.
        """
        replies = [None] * len(texts) if responses is None else list(responses)
        if not len(images) == len(texts) == len(replies):
            raise ValueError(
                f"{len(images)} images, {len(texts)} texts and {len(replies)} responses: give as many of each"
            )
        return self._judge([partial(prompt_of, *item) for item in zip(images, texts, strict=True)], replies, on_error)

    def judge(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str | None] | None = None,
        on_error: OnError = "raise",
    ) -> list[Verdict]:
        """One verdict a prompt, in order: of the query where its response is None, else of the response.

        Every reading of a text is judged and the strictest verdict kept. Content longer than the model reads is not
        cut: it fails closed, as does text that the tokenizer does not know and anything that the model answers with
        NaN. Raises ItemError as `moderate_batch` does.
        """
        replies = [None] * len(prompts) if responses is None else list(responses)
        return self._judge([partial(replace, prompt) for prompt in prompts], replies, on_error)

    def _judge(
        self, prompts: Sequence[Callable[[], Prompt]], replies: Sequence[str | None], on_error: OnError
    ) -> list[Verdict]:
        found = self._encode(prompts, replies, stop=on_error == "raise")
        judged = zip(replies, self._outcomes(found), strict=True)
        return [v if isinstance(v, Verdict) else self.refused(_kind(reply), str(v)) for reply, v in judged]

    def judge_timed(
        self, prompts: Sequence[Callable[[], Prompt]], replies: Sequence[str | None]
    ) -> tuple[list[Verdict | Exception], float, float]:
        """For servers: a verdict an item, or what its content is at fault with; seconds of encoding and of the forward.

        prompts: each makes its prompt, and may raise what `prompt_of` raises.
        """
        start = time.perf_counter()
        found = self._encode(prompts, replies, stop=False)
        encoded = time.perf_counter()
        return self._outcomes(found), encoded - start, time.perf_counter() - encoded

    def _encode(
        self, prompts: Sequence[Callable[[], Prompt]], replies: Sequence[str | None], stop: bool
    ) -> list[list[_Row] | Verdict | Exception]:
        """An item's rows, or the verdict on what the model cannot read whole, or its fault. stop: raise the first."""
        self._require({_kind(reply) for reply in replies})
        found: list[list[_Row] | Verdict | Exception] = []
        for i, (make, reply) in enumerate(zip(prompts, replies, strict=True)):
            try:
                found.append(self._item(i, make(), reply))
            except FAULTS as error:
                if stop:
                    raise ItemError(i, error) from error
                found.append(error)
        return found

    def _outcomes(self, found: Sequence[list[_Row] | Verdict | Exception]) -> list[Verdict | Exception]:
        """The strictest verdict of an item's rows; others as they are."""
        rows = [row for mine in found if isinstance(mine, list) for row in mine]
        strictest: dict[int, Verdict] = {}
        for row, verdict in zip(rows, self._verdicts(rows), strict=True):
            strictest[row.item] = max(strictest.get(row.item, verdict), verdict, key=Verdict.strictness)
        return [strictest[i] if isinstance(mine, list) else mine for i, mine in enumerate(found)]

    def _item(self, item: int, prompt: Prompt, reply: str | None) -> list[_Row] | Verdict:
        """The rows to judge an item by; or the verdict on what the model cannot read whole."""
        kind, texts = _kind(reply), {"question": prompt.text, "response": reply}
        for name, text in texts.items():
            if text is not None and (why := self._unread(text_of(text, name))):
                return self.refused(kind, f"the {name} is not read: {why}")
        rows = self._rows(item, prompt, reply)
        longest = max(row.length for row in rows)
        if longest > self.spec.max_length:
            why = f"{longest} tokens, more than the {self.spec.max_length} that the model reads"
            return self.refused(kind, why, truncated=True)
        return rows

    def _unread(self, text: str) -> str:
        """Why the tokenizer cannot read `text` in one of its readings; empty where it can."""
        return next(filter(None, (unread(self.encoder.tokenizer, self.neutralise(t)) for t in readings(text))), "")

    def refused(self, kind: Kind, reason: str, *, truncated: bool = False) -> Verdict:
        """The verdict for content that this guard cannot judge."""
        return fail_closed(
            kind, shortened(reason), self.spec.categories, truncated=truncated, calibration_id=self.calibration.id
        )

    def can_judge(self, kind: Kind) -> bool:
        return kind in self.spec.kinds

    def keep_pictures(self, limit: int) -> None:
        """Hold at most `limit` bytes of image features from now on."""
        self._pictures = VisionCache(limit)

    def _require(self, kinds: set[Kind]) -> None:
        for kind in sorted(kinds - set(self.spec.kinds)):
            plural = {"query": "queries", "response": "responses"}[kind]
            raise UntrainedKindError(
                f"this guard was trained to judge {' and '.join(self.spec.kinds) or 'nothing'}; its data had no "
                f"harmless or no harmful {plural}, so its verdict on a {kind} would mean nothing. Train it with "
                f"such {plural} (for queries: a benign set), or do not judge them"
            )

    def _rows(self, item: int, prompt: Prompt, reply: str | None) -> list[_Row]:
        texts = [t for t in readings(prompt.text) if t.strip()]
        if reply is None:
            return [self.row(replace(prompt, text=t), None, item) for t in texts]
        pairs = list(zip_longest(texts, replies := readings(reply)))
        return [
            self.row(replace(prompt, text=texts[-1] if t is None else t), replies[-1] if r is None else r, item)
            for t, r in pairs
        ]

    def row(self, prompt: Prompt, reply: str | None, item: int = 0) -> _Row:
        """Encode one query or response, its special tokens made harmless."""
        inputs = self.encoder.prompts([self.harmless(prompt)])
        if reply is None:
            return _Row(item, inputs, None)
        return _Row(item, inputs, self.encoder.responses([self.neutralise(reply)]).ids[0].tolist())

    def harmless(self, prompt: Prompt) -> Prompt:
        """The prompt with the special tokens in its text broken."""
        text = self.neutralise(prompt.text)
        return prompt if text == prompt.text else replace(prompt, text=text)

    def batch(self, rows: Sequence[_Row]) -> tuple[Inputs, Responses | None]:
        """Padded prompts and responses; a query among responses has a response of no tokens."""
        pad_id = self.encoder.pad_id
        inputs = collate([row.inputs for row in rows], pad_id=pad_id)
        if all(row.response is None for row in rows):
            return inputs, None
        return inputs, stack_responses([row.response or [] for row in rows], pad_id=pad_id)

    @torch.no_grad()
    def logits(self, rows: Sequence[_Row]) -> dict[str, Tensor]:
        """Raw logits on the CPU, in the order of `rows`: unsafe (B, 2), severity (B, 3), category (B, K)."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].length)
        parts = []
        for start in range(0, len(order), self.batch_size):
            inputs, replies = self.batch([rows[i] for i in order[start : start + self.batch_size]])
            inputs = encode_images(self.model.backbone, inputs, self._pictures)
            parts.append({name: z.float().cpu() for name, z in self.model(inputs, replies).items()})
        back = torch.tensor(order).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _verdicts(self, rows: Sequence[_Row]) -> list[Verdict]:
        if not rows:
            return []
        logits = scaled(self.logits(rows), self.calibration.temperatures)
        columns = zip(
            rows,
            logits["unsafe"].sigmoid().tolist(),
            severity_at_least(logits["severity"]).tolist(),
            severity_probabilities(logits["severity"]).tolist(),
            logits["category"].sigmoid().tolist(),
            torch.cat([z.isfinite() for z in logits.values()], dim=1).all(1).tolist(),
            strict=True,
        )
        return [
            self._verdict(_kind(row.response), unsafe, at_least, levels, categories)
            if finite
            else self.refused(_kind(row.response), "the model's answer is not a finite number")
            for row, unsafe, at_least, levels, categories, finite in columns
        ]

    def _verdict(
        self, kind: Kind, pair: list[float], at_least: list[float], levels: list[float], categories: list[float]
    ) -> Verdict:
        unsafe, named = pair[kind == "response"], dict(zip(self.spec.categories, categories, strict=True))
        decision = self.policy.decide(kind, unsafe, tuple(at_least), named)  # type: ignore[arg-type]
        level = sum(p >= 0.5 for p in at_least)
        return Verdict(
            kind=kind,
            flagged=decision.flagged,
            unsafe_probability=unsafe,
            severity=Severity(max(level, int(decision.flagged))),
            severity_probabilities=tuple(levels),  # type: ignore[arg-type]
            categories=named,
            action=decision.action,
            reason=decision.reason,
            calibration_id=self.calibration.id,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Heads, adapter or weights, processor, taxonomy, kinds, calibration and policy."""
        folder = Path(folder)
        self.model.save_pretrained(folder, self.encoder.processor)
        (folder / SPEC_FILE).write_text(json.dumps(asdict(self.spec), indent=2) + "\n", encoding="utf-8")
        self.calibration.save(folder / CALIBRATION_FILE)
        self.policy.save(folder / POLICY_FILE)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        base: Any = None,
        policy: Policy | str | Path | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        **load: Any,
    ) -> Guard:
        """What `save_pretrained` wrote. policy: another policy, or its file, in place of the saved one.

        base, load: as in `GuardModel.from_pretrained`. Raises FileNotFoundError, PolicyError, or ValueError where the
        calibration belongs to other weights.
        """
        folder = Path(folder)
        if not (folder / SPEC_FILE).is_file():
            raise FileNotFoundError(f"{folder} has no {SPEC_FILE}: it is not a saved guard")
        spec = _spec(folder / SPEC_FILE)
        model = cast(GuardModel, GuardModel.from_pretrained(folder, base, **load))
        if device is not None:
            model.to(device)
        if not isinstance(policy, Policy):
            policy = Policy.load(folder / POLICY_FILE if policy is None else policy, spec.categories)
        calibration = Calibration.load(folder / CALIBRATION_FILE)
        if calibration.weights and calibration.weights != weights_hash(model):
            raise DamagedFile(f"{folder / CALIBRATION_FILE} was fitted for other weights than these; calibrate again")
        encoder = Encoder(load_processor(folder), config=model.backbone.config)
        return cls(model, encoder, spec, policy, calibration, batch_size=batch_size)


def _spec(file: Path) -> GuardSpec:
    """What the guard judges. Raises DamagedFile."""
    saved = read_json(file)
    try:
        return GuardSpec(**saved | {"categories": tuple(saved["categories"]), "kinds": tuple(saved["kinds"])})
    except (TypeError, KeyError) as error:
        raise DamagedFile(f"{file} is not what a trained guard holds ({error}): copy it from there") from None


def _kind(reply: object) -> Kind:
    return "query" if reply is None else "response"
