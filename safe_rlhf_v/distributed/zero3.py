"""DeepSpeed ZeRO-3: full models cut over the ranks of a run, as configs/accelerate/deepspeed_zero3.yaml asks.

As under FSDP2, only the language model is cut: the frozen vision tower stays whole on every rank, and what is asked
without gradients (responses, scores, log-probabilities of a rollout) gathers the whole model first.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from safe_rlhf_v.config_io import SettingsError
from safe_rlhf_v.distributed.fsdp2 import launched_under, settle_uncut
from safe_rlhf_v.distributed.zero3_parts import load_optimizer_state, optimizer_state
from safe_rlhf_v.processes import process_state

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,  # only named in a log that is off
    "gradient_accumulation_steps": 1,  # our loop weighs each backward pass, and says when to step
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # small parameters are cut as well
        "stage3_max_reuse_distance": 0,  # a layer is freed after its forward and gathered again for the backward
        "memory_efficient_linear": False,  # it would replace torch.nn.functional.linear for every model of the process
        "reduce_bucket_size": 50_000_000,  # elements of a buffer that each engine holds
    },
}


def zero3_of_launch() -> Zero3 | None:
    """What `accelerate launch` asked of DeepSpeed: ZeRO-3, or nothing. Raises SettingsError for what is not supported
    (other stages, off-loading, a file of DeepSpeed's own, half precision) and where DeepSpeed is not installed.
    """
    asked = lambda name: os.environ.get(f"ACCELERATE_{name}", "none").lower()  # noqa: E731
    if not launched_under("DEEPSPEED"):
        return None
    example = "use configs/accelerate/deepspeed_zero3.yaml"
    if asked("DEEPSPEED_CONFIG_FILE") != "none":
        raise SettingsError(f"deepspeed_config_file is not read: {example}")
    if asked("DEEPSPEED_ZERO_STAGE") != "3":
        raise SettingsError(f"of DeepSpeed only ZeRO stage 3 is supported: {example}, or DDP")
    if any(asked(f"DEEPSPEED_OFFLOAD_{what}_DEVICE") != "none" for what in ("OPTIMIZER", "PARAM")):
        raise SettingsError(f"ZeRO-3 is supported without off-loading alone: {example}")
    if asked("DEEPSPEED_ZERO3_INIT") == "true":
        raise SettingsError("the vision tower is not cut, so transformers must load it whole: zero3_init_flag: false")
    if asked("MIXED_PRECISION") not in ("none", "no"):
        raise SettingsError("weights are cut and gathered in model.dtype: mixed_precision: no, and policy.bf16: true")
    if importlib.util.find_spec("deepspeed") is None:
        raise SettingsError("DeepSpeed is not installed: pip install 'safe-rlhf-v[deepspeed]', or cut by FSDP2")
    return Zero3(process_state().device)


class Zero3:
    """Cuts models into equal parts, one a rank. Takes the place of `Sharding` in `SeparateRoles`."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        if device.type == "cpu":  # gloo does; a kernel in shared memory would be compiled first, while ranks wait
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # at every call
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self.device = device

    def root(self, backbone: Any, head: nn.Module | None = None) -> Zero3Role:
        """Cut `backbone`, and perhaps its head, in place. Raises ValueError as `settle_uncut` does, and SettingsError
        for weights other than float32: the head is in float32, and an engine knows one type.
        """
        import deepspeed

        if backbone.dtype != torch.float32:
            raise SettingsError(f"model.dtype: {backbone.dtype} is not cut by ZeRO-3: set it to float32, or use FSDP2")
        whole = settle_uncut(backbone, self.device)
        root = _Root(backbone, head, whole)
        deepspeed.zero.Init(module=root, config_dict_or_path=CONFIG)
        return Zero3Role(root, backbone)


class _Root(nn.Module):
    """What DeepSpeed sees: the language model, a head, and the weights beside both (the output layer's) as its own.

    Its own weights are gathered once a pass, in however many chunks a rank then asks for log-probabilities; and what
    it does not hold, the vision tower, is not cut.
    """

    def __init__(self, backbone: Any, head: nn.Module | None, whole: set[nn.Parameter]) -> None:
        super().__init__()
        self.language, self.head = backbone.get_decoder(), head
        known = whole | set(self.language.parameters())
        for i, parameter in enumerate(p for p in backbone.parameters() if p not in known):
            self.register_parameter(f"beside_{i}", parameter)

    def forward(self, answer: Callable[[], Any]) -> Any:
        return answer()


class Zero3Role:
    """A model that ZeRO-3 has cut, and DeepSpeed's engine where it trains."""

    def __init__(self, root: _Root, backbone: Any) -> None:
        self.root, self.backbone = root, backbone
        self.engine: Any = None

    def ask(self, question: Callable[..., Any], roles: Any, *args: Any) -> Any:
        """question(roles, backbone, head, *args): layer by layer with gradients, else on the whole model."""
        import deepspeed

        answer = partial(question, roles, self.backbone, self.root.head, *args)
        if self.engine is None:
            with deepspeed.zero.GatheredParameters(self.root.parameters()):
                return answer()
        if torch.is_grad_enabled():
            return self.engine(answer)
        with deepspeed.zero.unwrap_model_for_generation(self.engine):
            return answer()

    def stepping(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float) -> Zero3Stepping:
        """Make the engine, which from now on steps with `optimizer` and clips gradients at max_grad_norm."""
        import deepspeed

        config = CONFIG | {"gradient_clipping": max_grad_norm}
        self.engine, *_ = deepspeed.initialize(model=self.root, optimizer=optimizer, config=config)
        return Zero3Stepping(self.engine, optimizer, parameters)


class Zero3Stepping:
    """DeepSpeed's engine gathers gradients, clips and steps."""

    def __init__(self, engine: Any, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self.engine, self.optimizer, self.parameters = engine, optimizer, parameters

    def zero_grad(self) -> None:
        self.engine.optimizer.zero_grad()

    def backward(self, accelerator: Accelerator, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, accelerator: Accelerator, refuse: Callable[[float], None]) -> float:
        self.engine.step()
        norm = math.nan if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())
        refuse(norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return optimizer_state(self.optimizer, self.parameters)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_optimizer_state(self.engine.optimizer, self.parameters, state)
