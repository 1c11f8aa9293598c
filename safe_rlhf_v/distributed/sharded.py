"""What a model is whose weights are spread over the ranks of a run: the one seam of FSDP2 and ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer


class ShardedModel(Protocol):
    """A backbone, perhaps with a head, that every rank asks as often and in the same order."""

    def ask(self, question: Callable[..., Any], roles: Any, *args: Any) -> Any:
        """question(roles, backbone, head, *args), with gradients where they are enabled."""
        ...

    def stepping(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_grad_norm: float
    ) -> Stepping | None:
        """How the model takes optimizer steps; None where as one process does."""
        ...


class Stepping(Protocol):
    """Gathers gradients of one network, clips them and steps."""

    def zero_grad(self) -> None: ...

    def backward(self, accelerator: Accelerator, loss: Tensor) -> None:
        """Add the gradient of a loss to what was gathered since `zero_grad`."""
        ...

    def step(self, accelerator: Accelerator, refuse: Callable[[float], None]) -> float:
        """One step; returns the norm before clipping. refuse: is told the norm, and raises where it is not finite."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, as of one process, but for tensors that `whole_tree` makes whole."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Sharder(Protocol):
    """Spreads models over the ranks: `Sharding` (FSDP2) or `Zero3`."""

    def root(self, backbone: Any, head: nn.Module | None = None) -> ShardedModel:
        """Spread `backbone`, and perhaps its head, in place."""
        ...
