"""What a rollout and its update move between devices, in bytes, and what that costs in time: a model to plan by.

DDP averages gradients once an optimizer step. FSDP2 gathers the weights of a model for every forward and again for the
backward, and scatters the gradients of every micro-batch. Counted against what two processes really send in
tests/training/test_ranks.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A rollout's update. updates: forwards with a backward of each trained network (epochs x minibatches x
    micro-batches); steps: optimizer steps of each; demonstrations: such forwards on demonstrations; role_forwards:
    forwards of each role over the rollout, without a backward.
    """

    updates: int
    steps: int
    critics: bool = True
    demonstrations: int = 0
    role_forwards: int = 1

    @property
    def networks(self) -> int:
        return 3 if self.critics else 1

    @property
    def forwards(self) -> int:
        """Without a backward: generation gathers once, then policy, reference, reward, cost and the critics forward."""
        return 1 + self.role_forwards * (6 if self.critics else 4)

    @property
    def backwards(self) -> int:
        return self.networks * self.updates + self.demonstrations


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of full tensors that collective calls of one device make or take in a rollout and its update."""

    all_gather: int = 0
    reduce_scatter: int = 0
    all_reduce: int = 0

    def on_the_wire(self, devices: int) -> float:
        """Bytes a device sends in ring algorithms: (n - 1) / n of a gather or scatter, twice that of an all-reduce."""
        return (self.all_gather + self.reduce_scatter + 2 * self.all_reduce) * (devices - 1) / devices


def fsdp2(work: Work, language: int, gradients: int) -> Traffic:
    """language: bytes of a language model as gathered; gradients: bytes of those of one trained model."""
    return Traffic(
        all_gather=language * (work.forwards + 2 * work.backwards), reduce_scatter=gradients * work.backwards
    )


def ddp(work: Work, gradients: int) -> Traffic:
    """gradients: bytes of those of one trained network."""
    return Traffic(all_reduce=gradients * work.networks * work.steps)


def hybrid_seconds(traffic: Traffic, gpus: int, nodes: int, inside: float, between: float) -> float:
    """Weights sharded within each node of `gpus` and replicated between nodes: only shards of gradients leave a node.

    inside, between: bytes a second of a device within a node and to other nodes.
    """
    within = (traffic.all_gather + traffic.reduce_scatter) * (gpus - 1) / gpus / inside
    return within + 2 * traffic.reduce_scatter / gpus * (nodes - 1) / nodes / between


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Per device: flops a second at the share that is reached, bytes a second of its memory and to other devices."""

    flops: float
    memory: float
    link: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of a rollout and its update: generation is bound by memory, compute by arithmetic, communication by the link."""

    generation: float
    compute: float
    communication: float

    @property
    def saturated(self) -> str:
        return max(("generation", "compute", "communication"), key=lambda name: float(getattr(self, name)))


def seconds(
    work: Work, traffic: Traffic, hardware: Hardware, devices: int, *, parameters: int, weights: int, rows: int,
    prompt: int, response: int,
) -> Seconds:  # fmt: skip
    """rows: of a device in a rollout; parameters, weights: of a language model, and its bytes. No overlap is assumed.

    2 flops a parameter and token forward, 4 backward (arXiv 2001.08361); a generated token reads all weights once.
    """
    tokens = rows * (prompt + response)
    forwards = 2 * parameters * tokens * (work.forwards - 1) + 2 * parameters * rows * prompt
    trained = 6 * parameters * tokens * (work.networks + (1 if work.demonstrations else 0))
    return Seconds(
        generation=response * weights / hardware.memory,
        compute=(forwards + trained) / hardware.flops,
        communication=traffic.on_the_wire(devices) / hardware.link,
    )
