"""Direct (offline) training on preference pairs: DPO and its safe variants, from data to a saved folder.

`train_direct` writes what the other supervised stages write (see `supervised`); the folder holds a whole model, from
which `evaluate`, `generate` and a further stage start. `train_sacpo` does so twice and merges.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beavertails_v.schema import Comparison
from safe_rlhf_v.algorithms.protocol import DirectAlgorithm
from safe_rlhf_v.algorithms.sacpo import SACPO, merge
from safe_rlhf_v.config import ModelSection, PairsSection, SettingsError
from safe_rlhf_v.direct.cost_ascent import CostAscent
from safe_rlhf_v.direct.rows import DirectCollator, DirectRows, read_columns, write_columns
from safe_rlhf_v.direct.trainer import DirectTrainer, displaced, logps_of, scores_of
from safe_rlhf_v.distributed.fsdp2 import launched_sharded
from safe_rlhf_v.processes import process_state
from safe_rlhf_v.roles.separate import same_tokens
from safe_rlhf_v.training.encode import LEFT_OUT, response_rows, thorough
from safe_rlhf_v.training.records import MetricsFile
from safe_rlhf_v.training.setup import Setup
from safe_rlhf_v.training.supervised import (
    Resume,
    finish,
    fit,
    list_missing,
    load_for_training,
    lora_settings,
    save_policy,
    training_arguments,
)
from safe_rlhf_v.training.trainers import ResponseLogps
from safe_rlhf_v.vlm.backbone import add_lora, load_backbone
from safe_rlhf_v.vlm.heads import HEADS_FILE, HeadedModel
from safe_rlhf_v.vlm.processing import Encoder, load_processor

STAGES = ("helpfulness", "safety")  # of SACPO

log = logging.getLogger(__name__)


def train_direct(
    algorithm: DirectAlgorithm,
    train: Sequence[Comparison],
    evaluation: Sequence[Comparison],
    base: str | Path,
    output_dir: str | Path,
    section: PairsSection,
    setup: Setup,
    reference: str | Path | None = None,
    resume_from_checkpoint: Resume = "auto",
    *,
    demonstrations: Sequence[Comparison] | None = None,
    reward_model: str | Path | None = None,
    cost_model: str | Path | None = None,
) -> dict[str, Any]:
    """Train `base` on pairs; returns what metrics.json holds: implicit-reward accuracy and margin on both axes.

    reference: a model folder; None takes `base`. Its log-probabilities are computed once, before training, and kept
    in `output_dir`. demonstrations: pairs whose responses section.ptx_coeff imitates; None takes `train`.
    reward_model, cost_model: folders, for an algorithm that asks for scores. Adapters train without
    dropout and are merged: the folder always holds a whole model. Raises as `train_sft`.
    """
    if launched_sharded():
        _refuse_under_sharding(algorithm, section)
    output_dir = Path(output_dir)
    backbone, encoder = load_for_training(base, setup, section)
    scorers = _scorers(algorithm, encoder, reward_model, cost_model)
    if section.use_lora:  # dropout would make log pi differ from log ref by chance
        add_lora(backbone, lora_settings(setup.model, dropout=0.0))
    rows, held_out = DirectRows(train, encoder, algorithm), DirectRows(evaluation, thorough(encoder))
    list_missing(output_dir, (train, rows), (evaluation, held_out))
    trainer = DirectTrainer(
        ResponseLogps(backbone, encoder.placeholder_ids),
        training_arguments(section, output_dir, setup.seed),
        algorithm=algorithm,
        ptx_coeff=section.ptx_coeff,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=DirectCollator(encoder),
        callbacks=[MetricsFile(output_dir / "metrics.jsonl")],
    )
    _precompute(trainer, encoder, setup.model, reference, scorers, {"train": rows, "evaluation": held_out})
    if section.ptx_coeff:
        pool = train if demonstrations is None else demonstrations
        rows.imitate(response_rows(pool, section.demonstrations, encoder), setup.seed)
    if trainer.constraint is not None:
        cost = _scorer(scorers["costs"], setup.model, trainer.args.device)
        trainer.add_callback(CostAscent(trainer, rows.prompts(), encoder, cost))
    measured = _fit(trainer, resume_from_checkpoint)
    trainer.make_whole()
    if trainer.is_world_process_zero():
        save_policy(backbone, encoder, output_dir, setup.model.dtype, base if section.use_lora else None)
    return finish(trainer, (train, rows), (evaluation, held_out), measured)


def _refuse_under_sharding(algorithm: DirectAlgorithm, section: PairsSection) -> None:
    if hasattr(algorithm, "constraint"):
        raise SettingsError(
            f"direct.algorithm: {type(algorithm).__name__} draws answers while it trains: not under FSDP2, use DDP"
        )
    if section.ptx_coeff:
        raise SettingsError("ptx_coeff above 0 takes two forwards a step of this trainer: not under FSDP2, use DDP")


def _fit(trainer: DirectTrainer, resume: Resume) -> dict[str, Any]:
    """As `fit`, with a warning of displaced likelihoods and the multiplier of an algorithm that has one."""
    measured = fit(trainer, "direct", resume)
    if warning := displaced(measured["evaluation"]):
        log.warning(warning)
    if trainer.constraint is not None:
        measured["multiplier"] = trainer.constraint.multiplier
    return measured


def _scorers(
    algorithm: DirectAlgorithm, encoder: Encoder, reward: str | Path | None, cost: str | Path | None
) -> dict[str, Path]:
    """Column to the folder of the model that fills it."""
    if not algorithm.needs_scores:
        return {}
    if reward is None or cost is None:
        raise SettingsError(f"{type(algorithm).__name__} needs scores: give a reward_model and a cost_model")
    for folder in (reward, cost):
        same_tokens(encoder.tokenizer, folder)
    return {"rewards": Path(reward), "costs": Path(cost)}


def _scorer(folder: Path, model: ModelSection, device: Any) -> HeadedModel:
    load = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    return HeadedModel.from_pretrained(folder, **load).to(device).requires_grad_(False)


def _precompute(
    trainer: DirectTrainer,
    encoder: Encoder,
    model: ModelSection,
    reference: str | Path | None,
    scorers: dict[str, Path],
    sets: dict[str, DirectRows],
) -> None:
    """Fill the columns of every set of rows, from files of an earlier start of this run where they are still right.

    Before the first step the policy is its own reference; another one is loaded, asked and let go.
    """
    folder = Path(str(trainer.args.output_dir))
    wanted = {name: scorers if name == "train" else {} for name in sets}
    source = (str(reference), trainer.start, *(_made(path) for path in scorers.values()))
    keys = {name: hashlib.sha256(f"{source}{rows.digest()}".encode()).hexdigest() for name, rows in sets.items()}
    found = {name: read_columns(folder / f"{name}_columns.safetensors", keys[name]) for name in sets}
    trainer.accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    missing = {name: rows for name, rows in sets.items() if found[name] is None}
    if missing:
        asked: Any = trainer.model
        if reference is not None:
            asked = _reference(reference, encoder, model, trainer.args.device)
        columns = {name: trainer.column(rows, logps_of(asked)) for name, rows in missing.items()}
        del asked
        for column, path in scorers.items():
            scorer = _scorer(path, model, trainer.args.device)
            for name, rows in missing.items():
                if column in wanted[name]:
                    columns[name] |= trainer.column(rows, scores_of(scorer, column))
            del scorer
        found |= columns
    for name, rows in sets.items():
        rows.columns = found[name]  # type: ignore[assignment]
        if name in missing and trainer.is_world_process_zero():
            write_columns(folder / f"{name}_columns.safetensors", keys[name], rows.columns)


def _reference(path: str | Path, encoder: Encoder, model: ModelSection, device: Any) -> ResponseLogps:
    same_tokens(encoder.tokenizer, path)
    options = model.model_dump(include={"dtype", "quantization", "attn_implementation"})
    backbone = load_backbone(path, **options, device=device)
    return ResponseLogps(backbone.requires_grad_(False), encoder.placeholder_ids)


def _made(folder: Path) -> str:
    """Tells two trainings of a scoring model apart."""
    return f"{folder} {hashlib.sha256((folder / HEADS_FILE).read_bytes()).hexdigest()[:16]}"


def train_sacpo(
    algorithm: SACPO,
    train: Sequence[Comparison],
    evaluation: Sequence[Comparison],
    base: str | Path,
    output_dir: str | Path,
    section: PairsSection,
    setup: Setup,
    reference: str | Path | None = None,
    resume_from_checkpoint: Resume = "auto",
) -> dict[str, Any]:
    """Both stages, in output_dir/helpfulness and output_dir/safety, and in output_dir the merge (1 - q) : q of the two.

    A stage that has ended is not trained again. Returns {"helpfulness": ..., "safety": ..., "q": ...}. reference: of
    stage one; that of stage two is stage one.
    """
    output_dir, measured = Path(output_dir), {}
    for name, one in zip(STAGES, algorithm.stages(), strict=True):
        folder = output_dir / name
        done = folder / "metrics.json"
        arguments = (train, evaluation, base, folder, section, setup, reference, resume_from_checkpoint)
        measured[name] = (
            json.loads(done.read_text(encoding="utf-8")) if done.is_file() else train_direct(one, *arguments)
        )
        base, reference = folder, None
    process_state().wait_for_everyone()
    if process_state().is_main_process:
        first, second = (output_dir / name for name in STAGES)
        merge_models(first, second, output_dir, algorithm.q, setup.model.dtype)
        shutil.copyfile(second / LEFT_OUT, output_dir / LEFT_OUT)
    return {"q": algorithm.q, **measured}


def merge_models(first: str | Path, second: str | Path, output: str | Path, q: float, dtype: str = "float32") -> None:
    """Write (1 - q) first + q second, with second's processor, as a whole model."""
    models = [load_backbone(path, dtype=dtype) for path in (first, second)]
    models[1].load_state_dict(merge(models[0].state_dict(), models[1].state_dict(), q))
    models[1].save_pretrained(output)
    load_processor(second).save_pretrained(output)
