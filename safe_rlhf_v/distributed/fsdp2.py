"""FSDP2: full models cut over the ranks of a run, as `accelerate launch` with configs/accelerate/fsdp2.yaml asks.

Only the language model is cut. The vision tower and its projector are frozen and stay whole on every rank, so nothing
that depends on whether a row has a picture is a collective call: ranks with and without pictures never wait for
one another. Generation gathers the whole policy first, so ranks may draw responses of different lengths.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from safe_rlhf_v.config_io import SettingsError
from safe_rlhf_v.distributed.zero3_parts import StatePart, gather, is_cut, put
from safe_rlhf_v.processes import process_state
from safe_rlhf_v.types import Inputs
from safe_rlhf_v.vlm.backbone import output_head, outside_language
from safe_rlhf_v.vlm.collation import alike
from safe_rlhf_v.vlm.source import ModelError


class Role(nn.Module):
    """A backbone, perhaps with a head, and one forward for whatever is asked of them: the root that FSDP sees."""

    def __init__(self, backbone: Any, head: nn.Module | None = None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, question: Callable[..., Any], roles: Any, *args: Any) -> Any:
        return question(roles, self.backbone, self.head, *args)

    def ask(self, question: Callable[..., Any], roles: Any, *args: Any) -> Any:
        """One forward of the root. Without gradients it gathers all: how many forwards of the backbone a question then
        takes is a rank's own affair (prompts that rows share are read once)."""
        return self(question if torch.is_grad_enabled() else partial(_whole, question), roles, *args)

    def stepping(self, optimizer: Any, parameters: Any, max_grad_norm: float) -> None:
        """As one process does: torch's optimizers know their parts of sharded parameters."""
        return None


def _whole(question: Callable[..., Any], roles: Any, backbone: Any, head: Any, *args: Any) -> Any:
    with gathered(backbone):
        return question(roles, backbone, head, *args)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """mesh: (ranks,), or (replicas, ranks of one) to cut within a node and copy between nodes.

    param_dtype: type that weights are gathered and computed in (None: as they are); the shards and their optimizer
    keep theirs. Layers are freed after a forward and gathered again for the backward.
    """

    mesh: DeviceMesh
    param_dtype: torch.dtype | None = None

    def root(self, backbone: Any, head: nn.Module | None = None) -> Role:
        """`backbone` and perhaps its head, cut, as the root of their forwards."""
        root = Role(backbone, head)
        self.shard(root, backbone, head)
        return root

    def shard(self, module: nn.Module, backbone: Any, *heads: nn.Module | None) -> None:
        """Cut `module`, the root whose forward runs `backbone`, in place: a group a decoder layer, one for the rest.

        heads are cut too, in groups of their own that compute in float32. Make optimizers after this.
        Raises ModelError for a language model without `layers`, ValueError where what is outside it takes gradients.
        """
        layers = getattr(backbone.get_decoder(), "layers", None)
        if layers is None:
            raise ModelError(f"{type(backbone).__name__}: its language model has no `layers` to cut; use DDP")
        whole = settle_uncut(backbone, self.mesh.device_type, self.param_dtype)
        options: dict[str, Any] = {"mesh": self.mesh, "reshard_after_forward": True}
        for head in heads:
            if head is not None:
                fully_shard(head, **options)
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=self.param_dtype)
        for layer in layers:
            fully_shard(layer, **options)
        fully_shard(module, ignored_params=whole, **options)


def settle_uncut(backbone: Any, device: str | torch.device, dtype: torch.dtype | None = None) -> set[nn.Parameter]:
    """Move what is not cut, and every buffer, to the device; returns the parameters of the vision tower and projector.

    Raises ValueError where they take gradients.
    """
    whole = set(outside_language(backbone))
    if any(p.requires_grad for p in whole):
        raise ValueError("cut models need a frozen vision tower: freeze_vision: true, or train under DDP")
    output_head(backbone)  # found by two forwards of the whole model, and remembered
    for parameter in whole:
        parameter.data = parameter.data.to(device, dtype)
    for module in backbone.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return whole


def refuse_several_forwards(inputs: Inputs) -> None:
    """Ranks whose models are cut make equally many forwards. Raises ModelError for rows that need some of their own."""
    if len(alike(inputs)) > 1:
        raise ModelError("rows of this family may need forwards of their own: ranks would wait; train under DDP")


def launched_sharded() -> bool:
    """Whether `accelerate launch` asks for FSDP or DeepSpeed."""
    return launched_under("FSDP") or launched_under("DEEPSPEED")


def launched_under(kind: Literal["FSDP", "DEEPSPEED"]) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def sharding_of_launch() -> Sharding | None:
    """What `accelerate launch` asked for by its configuration: FSDP2, or nothing. Raises SettingsError for what is not
    supported: FSDP1, parameters off-loaded to the CPU, and here DeepSpeed (`zero3_of_launch`).
    """
    if launched_under("DEEPSPEED"):
        raise SettingsError("models are cut by FSDP2 here, not DeepSpeed: use configs/accelerate/fsdp2.yaml")
    if not launched_under("FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()  # takes its settings from the environment
    if plugin.fsdp_version != 2 or os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise SettingsError("only FSDP2 without CPU off-loading is supported: use configs/accelerate/fsdp2.yaml")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise SettingsError("every rank loads its own part: set fsdp_cpu_ram_efficient_loading: false")
    dtypes = {"bf16": torch.bfloat16, "no": None}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in dtypes:
        raise SettingsError(f"mixed_precision: {precision} is not supported under FSDP2: use bf16 or no")
    return Sharding(mesh=_mesh(), param_dtype=dtypes[precision])


def _mesh() -> DeviceMesh:
    state = process_state()
    replicas = int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "1"))
    if state.num_processes % replicas:
        raise SettingsError(f"dp_replicate_size {replicas} does not divide {state.num_processes} processes")
    if replicas == 1:
        return init_device_mesh(state.device.type, (state.num_processes,), mesh_dim_names=("shard",))
    shape = (replicas, state.num_processes // replicas)
    return init_device_mesh(state.device.type, shape, mesh_dim_names=("replicate", "shard"))


@contextmanager
def gathered(backbone: Any) -> Iterator[None]:
    """Inside, every layer is whole and no forward talks to another rank: for many forwards in a row, as generation.

    Every rank enters, from within the forward of the root, which is whole by then. Nothing where nothing is cut.
    """
    groups = [m for m in backbone.modules() if isinstance(m, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) or is_cut(parameter)


def held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter, as `whole_tree` takes it, without its gradient."""
    return parameter if is_cut(parameter) else parameter.detach()


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter, cut or not."""
    return parameter.ds_shape if is_cut(parameter) else parameter.shape  # type: ignore[attr-defined, no-any-return]


def whole_tree(tree: Any, keep: bool = True) -> Any:
    """`tree` (mappings, lists, tensors) with every shard made whole, on the CPU; every rank must call it.

    One tensor is whole at a time on the device. keep: False on ranks that only take part, which get None for it.
    """
    if isinstance(tree, DTensor | StatePart) or is_cut(tree):
        whole = _full_tensor(tree) if isinstance(tree, DTensor) else gather(tree)
        return whole.cpu() if keep else None
    if isinstance(tree, Mapping):
        return {key: whole_tree(value, keep) for key, value in tree.items()}
    return [whole_tree(value, keep) for value in tree] if isinstance(tree, list) else tree


def _full_tensor(shard: Any) -> Tensor:
    return shard.detach().full_tensor()  # type: ignore[no-any-return]


def make_whole(module: nn.Module, keep: bool) -> None:
    """Before a model is saved on one rank, on every rank: put whole weights, on the CPU, where cut ones are.

    keep: on the rank that saves; others only take part. No forward of the model works after this.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if not is_sharded(parameter):
                continue
            if parameter not in made:
                whole = whole_tree(parameter, keep)
                made[parameter] = nn.Parameter(whole, parameter.requires_grad) if keep else parameter
            setattr(owner, name, made[parameter])


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, cut like `like`; the tensor itself where that is."""
    if not isinstance(like, DTensor):
        return whole
    placed = whole.to(like.device, like.dtype)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def overwrite(parameter: nn.Parameter, whole: Tensor) -> None:
    """Give a parameter, cut or not, the values of a tensor that every rank holds whole."""
    put(parameter, whole) if is_cut(parameter) else parameter.copy_(part_of(whole, parameter))


def optimizer_part(state: Mapping[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """A whole optimizer state_dict, cut like the parameters it belongs to."""

    def cut(value: Any, like: Tensor) -> Any:
        return part_of(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    parts = {i: {k: cut(v, parameters[i]) for k, v in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": parts}
