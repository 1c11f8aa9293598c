"""The trainer of the direct methods: it knows log-probabilities of pairs, and no algorithm by name.

Shapes: N pairs, B of them in a batch, R response length.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from safe_rlhf_v.algorithms.protocol import DirectAlgorithm
from safe_rlhf_v.constraint import Constraint
from safe_rlhf_v.direct.rows import DirectRows
from safe_rlhf_v.distributed.fsdp2 import refuse_several_forwards
from safe_rlhf_v.losses import token_cross_entropy
from safe_rlhf_v.statistics import mean_or_none
from safe_rlhf_v.training.encode import interleaved
from safe_rlhf_v.training.preference_metrics import ranking
from safe_rlhf_v.training.trainers import ResponseLogps, SupervisedTrainer
from safe_rlhf_v.types import Inputs, PairLogps, Responses
from safe_rlhf_v.vlm.backbone import encode_images, fingerprint, vision_is_frozen
from safe_rlhf_v.vlm.heads import HeadedModel

DUAL_STATE = "dual.json"
Batch = Mapping[str, Any]
DISPLACED = 2.0  # nats


class DirectTrainer(SupervisedTrainer):
    """Policy against a reference whose log-probabilities stand in the rows' columns, so that one model is held.

    ptx_coeff: weight of the cross-entropy on the rows' demonstrations, where they have some.
    start: fingerprint of the policy before training. constraint: that of an algorithm with a multiplier, else None; the
    multiplier is saved with every checkpoint.
    """

    def __init__(
        self,
        model: ResponseLogps,
        args: TrainingArguments,
        *,
        algorithm: DirectAlgorithm,
        ptx_coeff: float = 0.0,
        **more: Any,
    ) -> None:
        self.backbone, self.algorithm, self.ptx_coeff = model.backbone, algorithm, ptx_coeff
        self.start = fingerprint(model.backbone)
        self.constraint: Constraint | None = algorithm.constraint() if hasattr(algorithm, "constraint") else None
        super().__init__(model, args, **more)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        pairs, prompts = batch["pairs"], self.features(batch["pairs"].prompts)
        mismatched = None
        if "mismatched" in batch:
            with torch.no_grad():
                mismatched = summed_logps(model, prompts, batch["mismatched"]) - batch["reference_mismatched"]
                mismatched = self.accelerator.gather(mismatched) if self.accelerator.num_processes > 1 else mismatched
        responses = interleaved(pairs.responses)
        logps = PairLogps(
            policy=summed_logps(model, prompts, responses),
            reference=batch["reference"],
            lengths=responses.mask.sum(1).view(-1, 2),
            mismatched=mismatched,
        )
        loss, metrics = self.algorithm.loss(logps, pairs)
        if "shown_prompts" in batch:
            said = batch["shown_responses"]
            imitated = token_cross_entropy(model(self.features(batch["shown_prompts"]), said), said.mask)
            loss, metrics = loss + self.ptx_coeff * imitated, metrics | {"ptx_loss": imitated.item()}
        return loss, metrics

    def column(self, rows: DirectRows, values: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """values(batch), each (B, 2), over all rows and ranks: (N, 2) on the CPU. Draws no random number."""
        self.model.eval()
        found: dict[str, list[Tensor]] = defaultdict(list)
        with torch.random.fork_rng(), torch.no_grad(), self.accelerator.autocast():
            for batch in map(self._prepare_inputs, self.get_eval_dataloader(rows)):
                if self.cut:
                    refuse_several_forwards(batch["pairs"].prompts)
                for name, value in self.accelerator.gather_for_metrics(values(batch)).items():
                    found[name].append(value.float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def measure(self, batches: Any) -> dict[str, float | None]:
        """How the implicit reward log pi - log ref orders the pairs, on both axes, whichever was trained on."""
        self.model.eval()
        columns: dict[str, list[Tensor]] = defaultdict(list)
        for batch in map(self._prepare_inputs, batches):
            pairs = batch["pairs"]
            with torch.no_grad(), self.accelerator.autocast():
                policy = summed_logps(self.model, self.features(pairs.prompts), interleaved(pairs.responses))
            row = {"ratios": policy - batch["reference"], "more_helpful": pairs.more_helpful, "safer": pairs.safer}
            row |= {name: batch[name] for name in ("tied_helpfulness", "tied_safety", "unsafe")}
            for name, value in self.accelerator.gather_for_metrics(row).items():
                columns[name].append(value.cpu())
        return direct_metrics({name: torch.cat(values) for name, values in columns.items()})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.constraint is not None:
            Path(output_dir or str(self.args.output_dir), DUAL_STATE).write_text(
                json.dumps(self.constraint.state_dict()["dual"]), encoding="utf-8"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.constraint is not None:
            state = json.loads(Path(resume_from_checkpoint, DUAL_STATE).read_text(encoding="utf-8"))
            self.constraint.load_state_dict({"dual": state})
            self.take_multiplier()

    def take_multiplier(self) -> None:
        """Train on with the constraint's multiplier."""
        assert self.constraint is not None
        self.algorithm = self.algorithm.at(self.constraint.multiplier)  # type: ignore[attr-defined]


def summed_logps(model: nn.Module, prompts: Inputs, responses: Responses) -> Tensor:
    """(B, 2) sums over tokens of log pi. responses: 2B rows, a pair's two one after the other."""
    logps = model(prompts.repeat(2), responses)  # (2B, R)
    return logps.masked_fill(~responses.mask, 0.0).sum(1).view(-1, 2)  # type: ignore[no-any-return]


def logps_of(model: ResponseLogps) -> Callable[[Batch], dict[str, Tensor]]:
    """What `DirectTrainer.column` asks of a reference: its log-probabilities, of partners' responses too."""

    def values(batch: Batch) -> dict[str, Tensor]:
        prompts = batch["pairs"].prompts
        if vision_is_frozen(model.backbone):
            prompts = encode_images(model.backbone, prompts)
        found = {"reference": summed_logps(model, prompts, interleaved(batch["pairs"].responses))}
        if "mismatched" in batch:
            found["reference_mismatched"] = summed_logps(model, prompts, batch["mismatched"])
        return found

    return values


def scores_of(model: HeadedModel, name: str) -> Callable[[Batch], dict[str, Tensor]]:
    """The same of a reward or cost model."""

    def values(batch: Batch) -> dict[str, Tensor]:
        pairs = batch["pairs"]
        prompts = encode_images(model.backbone, pairs.prompts).repeat(2)
        return {name: model(prompts, interleaved(pairs.responses))["score"].view(-1, 2)}

    return values


def direct_metrics(columns: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Accuracy and margin in nats on both axes; pairs tied on an axis apart. log_ratio_*: mean log pi - log ref of the
    safer response of each pair, and of the unsafe and the safe ones.

    columns: ratios (N, 2) log pi - log ref; more_helpful, safer, tied_helpfulness, tied_safety (N,); unsafe (N, 2).
    """
    found: dict[str, float | None] = {}
    for axis, label in (("helpfulness", "more_helpful"), ("safety", "safer")):
        figures = ranking(columns["ratios"], columns[label], columns[f"tied_{axis}"])
        found |= {f"{axis}_{name}": figures[name] for name in ("accuracy", "margin", "pairs")}
    for name, rows in (("unsafe", columns["unsafe"]), ("safe", ~columns["unsafe"])):
        found[f"log_ratio_{name}"] = mean_or_none(columns["ratios"][rows])
    safer = columns["ratios"].gather(1, columns["safer"][:, None])
    return found | {"log_ratio_safer": mean_or_none(safer)}


def displaced(metrics: Mapping[str, float | None]) -> str | None:
    """A warning where training made the safer held-out answers less likely, as a difference of pairs allows: both
    answers may fall (likelihood displacement, arXiv 2410.08847). The bound of 2 nats is ours."""
    fall = metrics.get("log_ratio_safer")
    if fall is None or fall > -DISPLACED:
        return None
    return (
        f"the safer held-out answers have become {-fall:.1f} nats less likely than under the reference: the model "
        "moves away from both answers of a pair; raise beta, train less, give ptx_coeff, or compare the policy's own "
        "samples"
    )
