"""From settings to the objects a stage is made of."""

from __future__ import annotations

from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from beavertails_v import ComparisonSet, Prompt, ResponseSet, load_comparisons, load_responses
from safe_rlhf_v import duals
from safe_rlhf_v.config import Settings, SettingsError
from safe_rlhf_v.console import plain
from safe_rlhf_v.stages.folder import read_done

if TYPE_CHECKING:
    from safe_rlhf_v.algorithms.protocol import OnlineAlgorithm
    from safe_rlhf_v.constraint import Constraint
    from safe_rlhf_v.cost_measures import CostMeasure
    from safe_rlhf_v.generation.base import Engine
    from safe_rlhf_v.generation.vllm_engine import Client
    from safe_rlhf_v.models.processing import Encoder
    from safe_rlhf_v.models.roles import Roles
    from safe_rlhf_v.training.encode import LeftOut
    from safe_rlhf_v.training.online import OnlineArguments

Split = Literal["train", "evaluation"]
DATA = "a folder, file or hub id with preference data"


def require(value: str | None, key: str, what: str) -> str:
    """The setting's value, or a SettingsError that says which setting is missing."""
    if not value:
        raise SettingsError(f"{key} is not set: give {what}, in the settings file or as {key}=...")
    return value


def look_first(settings: Settings, model: str) -> None:
    """What can be said of a stage's settings and model before any data or weights are read."""
    from safe_rlhf_v.models.preflight import preflight

    require(settings.data.path, "data.path", DATA)
    preflight(model)


def comparisons(settings: Settings, split: Split) -> ComparisonSet:
    """The pairs of a split; what was left out is shown."""
    return _load(load_comparisons, settings, split)  # type: ignore[no-any-return]


def responses(settings: Settings, split: Split) -> ResponseSet:
    """The single responses of a split; those of pairs unrolled."""
    return _load(load_responses, settings, split)  # type: ignore[no-any-return]


def load(loader: Any, settings: Settings, split: Split) -> Any:
    """A split as settings.data says."""
    data = settings.data
    return loader(
        require(data.path, "data.path", DATA),
        data.train_split if split == "train" else data.evaluation_split,
        categories=data.categories,
        revision=data.revision,
        keep=data.keep,
        limit=data.limit if split == "train" else data.evaluation_limit,
        check_images=data.check_images,
        columns=data.columns,
    )


def _load(loader: Any, settings: Settings, split: Split) -> Any:
    found = load(loader, settings, split)
    plain(found.report.summary())
    return found


def base_model(settings: Settings) -> str:
    """The untrained model."""
    from safe_rlhf_v.models.kind import require_answering

    path = require(settings.model.path, "model.path", "a folder or hub id of a vision-language model")
    return require_answering(path, "model.path")


def start_model(settings: Settings) -> str:
    """What the later stages start from: model.start, else a finished <output_dir>/sft, else model.path."""
    from safe_rlhf_v.models.kind import require_answering

    if settings.model.start:
        return require_answering(settings.model.start, "model.start")
    sft = Path(settings.output_dir) / "sft"
    return str(sft) if read_done(sft) else base_model(settings)


def trained(settings: Settings, stage: str, given: str | None, key: str) -> str:
    """Folder of a trained model: the one given, else that of the finished stage, else a SettingsError.

    Raises ModelError where the one given is of another kind.
    """
    from safe_rlhf_v.models.kind import SCORERS, require_answering, require_scorer

    if given:
        return require_scorer(given, stage, key) if stage in SCORERS else require_answering(given, key)
    folder = Path(settings.output_dir) / stage
    if not read_done(folder):
        raise SettingsError(
            f"{folder} holds no finished {stage} model: run `safe-rlhf-v train {stage}` first, or set {key}"
        )
    return str(folder)


def device() -> Any:
    """This process's device."""
    from safe_rlhf_v.models.processes import process_state

    return process_state().device


def one_process(command: str) -> None:
    """Raises SettingsError under a launcher of several processes."""
    from safe_rlhf_v.models.processes import process_state

    if (n := process_state().num_processes) > 1:
        raise SettingsError(f"{command} runs as one process, not {n}: start it without accelerate launch")


def dual(settings: Settings) -> duals.Dual:
    """The multiplier's rule; for an algorithm without a multiplier, one that stays at 0."""
    section = settings.policy.dual
    if not algorithm_class(settings).has_multiplier:
        return duals.fixed(0.0)
    if section.kind == "fixed":
        return duals.fixed(section.initial)
    if section.kind == "pid":
        return duals.PIDDual(**section.pid.model_dump())
    rule: Any = {"log": duals.LogDual, "additive": duals.AdditiveDual, "augmented": duals.AugmentedDual}[section.kind]
    return rule(**{f.name: getattr(section, f.name) for f in fields(rule)})  # type: ignore[no-any-return]


def measure(settings: Settings) -> CostMeasure:
    """Of what the threshold is a bound."""
    from safe_rlhf_v.cost_measures import CVaR, HighConfidence, Mean

    section = settings.policy.measure
    if section.kind == "high_confidence":
        return HighConfidence(kappa=section.kappa)
    return CVaR(alpha=section.alpha) if section.kind == "cvar" else Mean()


def algorithm_class(settings: Settings) -> Any:
    """The class of the algorithm that policy.algorithm names."""
    from safe_rlhf_v.algorithms.crpo import CRPO
    from safe_rlhf_v.algorithms.group_lag import GroupLag
    from safe_rlhf_v.algorithms.imitation import Imitation
    from safe_rlhf_v.algorithms.p3o import P3O
    from safe_rlhf_v.algorithms.ppo_lag import PPOLag
    from safe_rlhf_v.algorithms.repo import RePO
    from safe_rlhf_v.algorithms.rloo_lag import RLOOLag

    kinds: list[Any] = [PPOLag, GroupLag, RLOOLag, RePO, CRPO, P3O, Imitation]
    return {k.__module__.rpartition(".")[2]: k for k in kinds}[settings.policy.algorithm]


def constraint(settings: Settings, threshold: float) -> Constraint:
    """That of the algorithm, with its multiplier's rule and its measure, for one run."""
    made = algorithm(settings, threshold)
    return made.constraint(dual(settings), measure(settings), settings.policy.multiplier_patience)


def takes_threshold(settings: Settings) -> bool:
    """Whether policy.threshold bounds what the algorithm bounds; else it has a bound of its own, on every prompt."""
    return "threshold" in {f.name for f in fields(algorithm_class(settings))}


def needs_critics(settings: Settings) -> bool:
    """Whether the algorithm trains two critics."""
    return algorithm(settings, 0.0).critics is not None


def algorithm(settings: Settings, threshold: float) -> OnlineAlgorithm:
    """The algorithm with its own section, and the policy section's beta and threshold where it knows them."""
    policy, kind = settings.policy, algorithm_class(settings)
    shared = {"beta": policy.beta, "threshold": threshold}
    known = {f.name for f in fields(kind)}
    return kind(**getattr(policy, policy.algorithm).model_dump(), **{k: v for k, v in shared.items() if k in known})  # type: ignore[no-any-return]


def direct_algorithm(settings: Settings) -> Any:
    """The algorithm on pairs (or SACPO, which is two of them) with its own section and the direct section's beta."""
    from safe_rlhf_v.algorithms.bfpo import BFPO
    from safe_rlhf_v.algorithms.c_dpo import CDPO
    from safe_rlhf_v.algorithms.dpo import DPO
    from safe_rlhf_v.algorithms.kto import KTO
    from safe_rlhf_v.algorithms.mm_dpo import MMDPO
    from safe_rlhf_v.algorithms.sacpo import SACPO
    from safe_rlhf_v.algorithms.safe_dpo import SafeDPO

    kinds: list[Any] = [DPO, KTO, SACPO, SafeDPO, BFPO, CDPO, MMDPO]
    direct = settings.direct
    kind = {k.__module__.rpartition(".")[2]: k for k in kinds}[direct.algorithm]
    shared = {"beta": direct.beta, "allow_contradictory": "contradictory" in settings.data.keep}
    known = {f.name for f in fields(kind)}
    own = getattr(direct, direct.algorithm).model_dump()
    return kind(**own, **{k: v for k, v in shared.items() if k in known})


def online_arguments(settings: Settings, output_dir: Path) -> OnlineArguments:
    """The online loop's arguments: those of the policy section that it knows."""
    from safe_rlhf_v.training.online import OnlineArguments

    known = {f.name for f in fields(OnlineArguments)}
    values = settings.policy.model_dump(include=known)
    return OnlineArguments(**values, output_dir=output_dir, seed=settings.seed)


def roles(settings: Settings, start: str, reward: str, cost: str) -> Roles:
    """All six roles, on one backbone or on separate models."""
    from safe_rlhf_v.models.roles import AdapterRoles, SeparateRoles
    from safe_rlhf_v.models.sharding import launched_sharded, sharding_of_launch
    from safe_rlhf_v.models.zero3 import zero3_of_launch
    from safe_rlhf_v.training.supervised import lora_settings

    model, policy = settings.model, settings.policy
    shared: dict[str, Any] = dict(
        critics=needs_critics(settings),
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        max_prompt_length=model.max_prompt_length,
        device=device(),
        bf16=policy.bf16,
        cache=policy.engine.cache,
        gradient_checkpointing=policy.gradient_checkpointing,
        torch_compile=policy.torch_compile,
        use_liger_kernel=policy.use_liger_kernel,
        vision_cache_bytes=policy.vision_cache_mb * 2**20,
    )
    if policy.roles == "separate":
        sharding = zero3_of_launch() or sharding_of_launch()
        return SeparateRoles.from_pretrained(start, reward, cost, sharding=sharding, **shared)
    if launched_sharded():
        raise SettingsError(
            "policy.roles = 'adapters' trains under DDP (configs/accelerate/ddp.yaml): only adapters take gradients, "
            "so there is little to cut. FSDP2 and ZeRO-3 need policy.roles: separate"
        )
    # without dropout, under which old and new log-probabilities would differ by chance
    adapters: dict[str, Any] = dict(lora=lora_settings(settings, dropout=0.0), quantization=model.quantization)
    return AdapterRoles.from_pretrained(start, reward, cost, **adapters, **shared)


def engine(settings: Settings, start: str, roles: Roles, folder: Path) -> Engine | None:
    """What draws responses in rollouts; None where the roles do so. folder: where adapters are put for vLLM."""
    section = settings.policy.engine
    if section.kind == "transformers":
        return None
    from safe_rlhf_v.generation.transformers_engine import TransformersEngine
    from safe_rlhf_v.generation.vllm_engine import VLLMEngine, colocated
    from safe_rlhf_v.generation.vllm_server import VLLMServer
    from safe_rlhf_v.models.processes import process_state
    from safe_rlhf_v.models.roles import AdapterRoles

    assert isinstance(roles, AdapterRoles), "held by the settings"
    client: Client
    if section.url:
        client = VLLMServer(section.url)
    else:
        one_process("policy.engine.kind vllm without a url")
        limits = dict(gpu_memory_utilization=section.gpu_memory_utilization, max_model_len=section.max_model_len)
        shared: dict[str, Any] = dict(rank=settings.model.lora.r, dtype=settings.model.dtype, seed=settings.seed)
        client = colocated(start, **shared, **limits)  # type: ignore[arg-type]
    eos_ids = TransformersEngine(roles.backbone, roles.encoder).eos_ids
    own = folder / f"vllm-{process_state().process_index}"
    return VLLMEngine(client, roles.encoder, roles.save_policy_adapter, own, eos_ids)


def benign_prompts(settings: Settings, split: Split) -> ResponseSet | list[Prompt]:
    """Data whose prompts are harmless, for the guard, beside those of the data; what was left out is shown.

    Raises DataError where one of them is labelled harmful.
    """
    from safe_rlhf_v.training.encode import DataError

    source = settings.guard.benign
    if source is None:
        return []
    name = settings.data.train_split if split == "train" else settings.data.evaluation_split
    found = load_responses(source, name, check_images=settings.data.check_images)
    plain(found.report.summary())
    for i in range(len(found)):
        if (prompt := found[i].prompt).harmful:
            label = f"category {prompt.category!r}" if prompt.category else f"severity {int(prompt.severity or 0)}"
            file, row = found.origin(i)
            raise DataError(f"{file} row {row}: the prompt has {label}; leave it out of the benign set")
    return found


def demonstrations(
    settings: Settings, data: ComparisonSet, encoder: Encoder, left_out: list[LeftOut] | None = None
) -> list[tuple[Prompt, str]] | None:
    """(prompt, response) pairs for the ptx term: those that SFT would imitate, which leaves out what is too long.

    left_out: takes what is left out.
    """
    from safe_rlhf_v.training.encode import response_rows

    if not settings.policy.ptx_coeff:
        return None
    limited = copy(encoder)
    limited.max_response_length = settings.model.max_response_length
    rows = response_rows(data, settings.policy.demonstrations or settings.sft.responses, limited)
    if left_out is not None:
        left_out += rows.left_out
    if rows.left_out:
        plain(f"{len(rows.left_out)} demonstrations left out, for example: {rows.left_out[0].detail}")
    return [(row.prompt, row.response.text) for row in (rows[i] for i in range(len(rows)))]
