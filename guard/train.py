"""Training a guard: one run gives heads, temperatures, figures and a folder that `Guard.from_pretrained` reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from beavertails_v.schema import LabelledResponse, Prompt
from beavertails_v.sets import ResponseSet
from beavertails_v.taxonomy import Taxonomy
from guard import losses
from guard.calibration import Calibration, Labels, fit
from guard.classifier import Guard
from guard.evaluate import KINDS, evaluate
from guard.examples import (
    Example,
    Lesson,
    examples_of,
    held_out,
    labels_of,
    lesson_labels,
    lessons_of,
    teachable,
    unknown_queries,
)
from guard.golden import write_from
from guard.model import GuardModel, GuardSpec, build_model, weights_hash
from guard.policy import Policy
from guard.types import Kind
from safe_rlhf_v.arguments import GuardOptions
from safe_rlhf_v.config import ModelSection, TrainSection
from safe_rlhf_v.statistics import Resampling
from safe_rlhf_v.training.encode import (
    DataError,
    LeftOut,
    dropped,
    fault,
    left_out_at,
    list_left_out,
    nothing_left,
)
from safe_rlhf_v.training.records import MetricsFile
from safe_rlhf_v.training.setup import Setup
from safe_rlhf_v.training.supervised import (
    Resume,
    freeze_output_layer,
    limited_encoder,
    lora_settings,
    prepared_backbone,
    run,
    training_arguments,
    write_measured,
)
from safe_rlhf_v.training.trainers import SupervisedTrainer
from safe_rlhf_v.vlm.image_features import VisionCache
from safe_rlhf_v.vlm.processing import Encoder, load_processor

log = logging.getLogger(__name__)
Benign = Sequence[Prompt] | ResponseSet  # prompts that are harmless by their source


def train_guard(
    train: Sequence[LabelledResponse],
    evaluation: Sequence[LabelledResponse],
    base: str | Path,
    output_dir: str | Path,
    section: TrainSection,
    setup: Setup,
    *,
    benign: Benign = (),
    benign_evaluation: Benign = (),
    options: GuardOptions | None = None,
    policy: Policy | None = None,
    taxonomy: Taxonomy | None = None,
    resampling: Resampling | None = None,
    resume_from_checkpoint: Resume = "auto",
) -> dict[str, Any]:
    """Train a guard on `base` and save it to `output_dir`; returns what metrics.json holds.

    Each prompt is a query example, each response a response example; one forward teaches a response and the query
    before it, so a prompt counts once for each of its responses. benign: harmless prompts that the data lacks:
    where none is labelled harmless (as in BeaverTails-V and PKU-SafeRLHF) and none are given, queries are not learned,
    the log says so and `moderate` refuses to judge one. resampling: of the intervals of what is measured.
    What loading left out and what cannot be encoded is in left_out.jsonl before training starts; known inputs for a
    server's self-test are in golden.json at the end, pictures of held-out rows among them.
    resume_from_checkpoint: "auto" (the newest whole checkpoint in output_dir), a folder, or None.
    Raises DataError where the data can teach nothing.
    """
    options, output_dir = options or GuardOptions(), Path(output_dir)
    examples = examples_of(train, prompts_of(benign))
    unknown = _unknown(examples)
    kinds = teachable_kinds(examples)
    guard = fresh_guard(base, section, setup, kinds, options, taxonomy or Taxonomy.load(), policy)
    rows, unread = encodable({kind: examples[kind] for kind in kinds}, guard, setup, train, benign)
    left_out = [*dropped(train), *dropped(benign), *unread]
    of_evaluation = [*dropped(evaluation), *dropped(benign_evaluation)]
    list_left_out(output_dir, left_out + of_evaluation, [f"{len(unread)} examples"] if unread else [])
    resampling = resampling or Resampling(seed=setup.seed)
    rest, calibration_rows = held_out(rows, options.calibration_share)
    if not rest:
        raise nothing_left("no example is left to train on", len(unread), unread)
    trainer = GuardTrainer(
        guard.model,
        training_arguments(section, output_dir, setup.seed),
        options=options,
        train_dataset=lessons_of(*([e for e in rest if e.kind == kind] for kind in KINDS)),
        data_collator=GuardCollator(guard),
        callbacks=[MetricsFile(output_dir / "metrics.jsonl")],
    )
    run(trainer, "guard", resume_from_checkpoint)
    measured: dict[str, Any] = {"steps": trainer.state.global_step, "examples": len(rest), "left_out": len(left_out)}
    measured |= {"evaluation_left_out": len(of_evaluation), "unknown_queries": unknown}
    trainer.make_whole()
    if trainer.is_world_process_zero():
        if trainer.cut:
            guard = _saved_and_loaded(guard, output_dir, setup.model, trainer.args.device)
        _save(guard, output_dir, calibration_rows, evaluation)
        measured |= _measure(guard, evaluation, prompts_of(benign_evaluation), resampling)
    return write_measured(trainer, measured)


def _save(guard: Guard, folder: Path, calibration: Sequence[Example], evaluation: Sequence[LabelledResponse]) -> None:
    """The trained guard with its calibration, and the known inputs by which a server knows it again."""
    guard.model.eval()
    guard.calibration = calibrate(guard, calibration)
    guard.save_pretrained(folder)
    if len(evaluation):
        write_from(guard, folder, evaluation)


def _unknown(examples: Mapping[Kind, Sequence[Example]]) -> int:
    """How many queries are labelled neither harmful nor harmless; the log says so."""
    unknown = unknown_queries(examples)
    if unknown:
        log.warning(
            "%d of %d queries are labelled neither harmful nor harmless (no category): none is taught as harmless",
            unknown, unknown + len(examples["query"]),
        )  # fmt: skip
    return unknown


def teachable_kinds(examples: Mapping[Kind, Sequence[Example]]) -> list[Kind]:
    """The kinds with both safe and unsafe examples. Logs those that are left out; raises DataError if none is left."""
    kinds = [kind for kind in KINDS if teachable(examples[kind])]
    for kind in set(KINDS) - set(kinds):
        unsafe = sum(e.unsafe for e in examples[kind])
        log.warning(
            "the data has %d unsafe and %d safe %s examples: the guard cannot learn to tell them apart and will refuse "
            "to judge a %s%s", unsafe, len(examples[kind]) - unsafe, kind, kind,
            "; give benign prompts to teach it" if kind == "query" else "",
        )  # fmt: skip
    if not kinds:
        raise DataError(
            "neither queries nor responses come both safe and unsafe: there is nothing for a guard to learn"
        )
    return kinds


def fresh_guard(
    base: str | Path,
    section: TrainSection,
    setup: Setup,
    kinds: Sequence[Kind],
    options: GuardOptions,
    taxonomy: Taxonomy,
    policy: Policy | None = None,
) -> Guard:
    """An untrained guard on `base`: its vision tower frozen as the section says, its seed set first."""
    backbone = prepared_backbone(base, setup, section)
    headed = build_model(backbone, len(taxonomy.secondary), lora_settings(setup.model) if section.use_lora else None)
    freeze_output_layer(backbone)
    return Guard(
        headed,
        Encoder(load_processor(base), config=backbone.config),
        GuardSpec.of(taxonomy, kinds, backbone),
        policy,
        batch_size=section.per_device_eval_batch_size,
        picture_cache=options.picture_cache,
    )


def prompts_of(benign: Benign) -> list[Prompt]:
    """Each prompt once, of a data set or of prompts."""
    return benign.prompts() if isinstance(benign, ResponseSet) else list(benign)  # type: ignore[arg-type]


def encodable(
    examples: Mapping[Kind, Sequence[Example]], guard: Guard, setup: Setup, train: Any = (), benign: Any = ()
) -> tuple[list[Example], list[LeftOut]]:
    """The examples within setup.model's lengths; the others by name, file, row and split. Nothing is cut.

    train, benign: the data that the examples are of; response i is that of row i of `train`.
    """
    encoder = limited_encoder(guard.encoder.processor, setup, guard.model.backbone.config)
    kept, faults = [], []
    for i, example in ((i, e) for of_kind in examples.values() for i, e in enumerate(of_kind)):
        texts = [] if example.response is None else [guard.neutralise(example.response)]
        why = fault(guard.harmless(example.prompt), texts, encoder)
        if why is None:
            kept.append(example)
        else:
            faults.append((i, example, why))
    asked = _first_rows(benign) | _first_rows(train) if faults else {}
    return kept, [
        left_out_at(*((train, i) if example.response is not None else asked[example.prompt.id]), example.prompt, *why)
        for i, example, why in faults
    ]


def _first_rows(data: Any) -> dict[str, tuple[Any, int]]:
    """Prompt ids to a data set, or prompts, and the first row there that has them."""
    rows = list(enumerate(data))
    return {(row if isinstance(row, Prompt) else row.prompt).id: (data, i) for i, row in reversed(rows)}


class GuardCollator:
    """Lessons to prompts (B, P), responses (B, R) and labels of the 2B rows of `GuardModel.forward(both=True)`.

    Without any response in the batch: prompts and labels of their B rows.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Any]:
        names = self.guard.spec.categories
        last = [lesson.last for lesson in lessons]
        inputs, responses = self.guard.batch([self.guard.row(e.prompt, e.response) for e in last])
        if responses is None:
            return {"inputs": inputs, "labels": labels_of(last, names)}
        return {"inputs": inputs, "responses": responses, "labels": lesson_labels(lessons, names)}


class GuardTrainer(SupervisedTrainer):
    """The three losses, heads at their own learning rate, image features kept between epochs."""

    def __init__(self, model: GuardModel, args: TrainingArguments, *, options: GuardOptions, **kwargs: Any) -> None:
        self.backbone, self.options = model.backbone, options
        self.pictures = VisionCache(options.picture_cache)
        super().__init__(model, args, **kwargs)

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        logits = model(self.features(batch["inputs"]), batch.get("responses"), both="responses" in batch)
        return guard_loss(logits, batch["labels"], self.options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As Trainer's, but for the learning rate of the heads."""
        if self.optimizer is None:  # type: ignore[has-type]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            rates = {True: self.options.head_learning_rate, False: self.args.learning_rate}
            groups = [
                {
                    "params": [p for name, p in named if name.startswith("heads.") is heads],
                    "lr": rate,
                    "weight_decay": self.args.weight_decay,
                }
                for heads, rate in rates.items()
            ]
            self.optimizer = cls([group for group in groups if group["params"]], **kwargs)
        return self.optimizer


def _saved_and_loaded(guard: Guard, folder: Path, model: ModelSection, device: Any) -> Guard:
    """A guard whose weights were cut, as one that runs again."""
    guard.save_pretrained(folder)
    load = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    return Guard.from_pretrained(folder, device=device, batch_size=guard.batch_size, **load)


def guard_loss(logits: Mapping[str, Tensor], labels: Labels, options: GuardOptions) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the three losses, and each on its own."""
    parts = {
        "unsafe": losses.unsafe_loss(logits["unsafe"].float(), labels.unsafe, labels.is_response),
        "severity": losses.severity_loss(logits["severity"].float(), labels.severity, labels.unsafe),
        "category": losses.category_loss(logits["category"].float(), labels.categories),
    }
    total = sum(getattr(options, f"{name}_weight") * part for name, part in parts.items())
    return total, {f"{name}_loss": part.item() for name, part in parts.items()}  # type: ignore[return-value]


def calibrate(guard: Guard, examples: Sequence[Example]) -> Calibration:
    """Temperatures from rows that were not trained on; none without rows."""
    if not examples:
        return Calibration()
    logits = guard.logits([guard.row(e.prompt, e.response) for e in examples])
    return fit(logits, labels_of(examples, guard.spec.categories), weights_hash(guard.model))


def _measure(
    guard: Guard, evaluation: Sequence[LabelledResponse], benign: Sequence[Prompt], resampling: Resampling
) -> dict[str, Any]:
    found: dict[str, Any] = {"kinds": list(guard.spec.kinds), "calibration_fit": dict(guard.calibration.report)}
    if len(evaluation):
        intervals: Any = {"samples": resampling.draws, "level": resampling.level, "seed": resampling.seed}
        found["evaluation"] = evaluate(guard, evaluation, benign=benign, **intervals)
    return found


def shown(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a card shows of what was measured: counts, and the figures of each head without their intervals."""
    report = measured.get("evaluation", {})
    tables = {name: report[name] for name in ("query", "response", "severity") if report.get(name)}
    heads = {name: {k: v for k, v in table.items() if k != "intervals"} for name, table in tables.items()}
    flat = {k: v for k, v in measured.items() if isinstance(v, (int, float))}
    more = {k: report[k] for k in ("over_refusal", "blind_f1", "calibration_id") if k in report}
    return flat | more | heads
