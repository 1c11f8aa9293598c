"""From settings to the objects a stage is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_rlhf_v.config import EngineSection, ModelSection, PolicySection, Settings, SettingsError
from safe_rlhf_v.stages.models import device, one_process
from safe_rlhf_v.training.setup import Setup

if TYPE_CHECKING:
    from safe_rlhf_v.generation.base import Engine
    from safe_rlhf_v.generation.vllm_engine import Client
    from safe_rlhf_v.roles.protocol import Roles


def setup(settings: Settings) -> Setup:
    """What every training of a run shares."""
    return Setup(model=settings.model, data=settings.data, seed=settings.seed)


def roles(policy: PolicySection, model: ModelSection, start: str, reward: str, cost: str) -> Roles:
    """All six roles, on one backbone or on separate models."""
    from safe_rlhf_v.distributed.fsdp2 import launched_sharded, sharding_of_launch
    from safe_rlhf_v.distributed.zero3 import zero3_of_launch
    from safe_rlhf_v.roles.protocol import AdapterRoles, SeparateRoles
    from safe_rlhf_v.training.supervised import lora_settings

    shared: dict[str, Any] = dict(
        critics=policy.made().critics is not None,
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
    adapters: dict[str, Any] = dict(lora=lora_settings(model, dropout=0.0), quantization=model.quantization)
    return AdapterRoles.from_pretrained(start, reward, cost, **adapters, **shared)


def engine(section: EngineSection, setup: Setup, start: str, roles: Roles, folder: Path) -> Engine | None:
    """What draws responses in rollouts; None where the roles do so. folder: where adapters are put for vLLM."""
    if section.kind == "transformers":
        return None
    from safe_rlhf_v.generation.transformers_engine import TransformersEngine
    from safe_rlhf_v.generation.vllm_engine import VLLMEngine, colocated
    from safe_rlhf_v.generation.vllm_server import VLLMServer
    from safe_rlhf_v.processes import process_state
    from safe_rlhf_v.roles.protocol import AdapterRoles

    assert isinstance(roles, AdapterRoles), "held by the settings"
    client: Client
    if section.url:
        client = VLLMServer(section.url)
    else:
        one_process("policy.engine.kind vllm without a url")
        limits = dict(gpu_memory_utilization=section.gpu_memory_utilization, max_model_len=section.max_model_len)
        shared: dict[str, Any] = dict(rank=setup.model.lora.r, dtype=setup.model.dtype, seed=setup.seed)
        client = colocated(start, **shared, **limits)  # type: ignore[arg-type]
    eos_ids = TransformersEngine(roles.backbone, roles.encoder).eos_ids
    own = folder / f"vllm-{process_state().process_index}"
    return VLLMEngine(client, roles.encoder, roles.save_policy_adapter, own, eos_ids)
