"""Roles without a vision-language model: a GRU over ten tokens, so that tests of the loop take milliseconds.

The prompt is read as the mean of its embeddings, so padding on either side changes nothing. Token 0 pads, 1 ends. The
reward counts token 5 and the cost counts token 7: both known for any response.
"""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beavertails_v.schema import Prompt
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.cost_measures import MEAN
from safe_rlhf_v.duals import LogDual
from safe_rlhf_v.online import loop as online
from safe_rlhf_v.online import updates as optimization
from safe_rlhf_v.online.loop import OnlineArguments, OnlineTrainer
from safe_rlhf_v.tensors import token_logps
from safe_rlhf_v.training import checkpoint, runtime
from safe_rlhf_v.types import Inputs, Responses

PAD, EOS, GOOD, BAD, VOCABULARY = 0, 1, 5, 7, 10
PROMPTS = [Prompt(text=text) for text in ("2 3 4", "8 9", "3", "6 6 2 8", "4 9 3", "2", "9 8 7 6 4")]


class FakeEncoder:
    placeholder_ids = ()
    eos_id, pad_id = EOS, PAD

    def prompts(self, prompts: list[Prompt]) -> Inputs:
        rows = [[int(word) for word in prompt.text.split()] for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return Inputs(input_ids=ids, attention_mask=mask, vision=tuple({} for _ in rows))

    def responses(self, texts: list[str]) -> Responses:
        rows = [[*(int(word) for word in text.split()), EOS] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        return Responses(ids=ids, mask=torch.arange(width) < torch.tensor([[len(row)] for row in rows]))

    def decode(self, responses: Responses) -> list[str]:
        rows = zip(responses.ids, responses.mask, strict=True)
        return [" ".join(str(int(i)) for i in ids[mask] if i != EOS) for ids, mask in rows]


class Recurrent(nn.Module):
    """States that predict each response token, (B, R, H), and a head on them."""

    def __init__(self, outputs: int, hidden: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs, bias=False)

    def forward(self, inputs: Inputs, responses: Responses) -> Tensor:
        mask = inputs.attention_mask.float()[..., None]
        context = (self.embed(inputs.input_ids) * mask).sum(1) / mask.sum(1)  # (B, H)
        before = torch.cat([torch.zeros_like(responses.ids[:, :1]), responses.ids[:, :-1]], dim=1)
        return self.gru(self.embed(before), context[None])[0]  # type: ignore[no-any-return]


class FakeRoles:
    def __init__(self, seed: int = 0, critics: bool = True) -> None:
        torch.manual_seed(seed)
        self.encoder = FakeEncoder()
        self.policy = Recurrent(VOCABULARY)
        self.reference = copy.deepcopy(self.policy)
        self.critics = {"reward": Recurrent(1), "cost": Recurrent(1)} if critics else {}
        self.prepared: list[int] = []
        self.sharded_models: dict[str, Any] = {}

    def gather_policy(self, keep: bool) -> None:
        """Every weight is whole."""

    def prepare(self, inputs: Inputs) -> Inputs:
        self.prepared.append(len(inputs))
        return inputs

    def reads_once(self, inputs: Inputs) -> bool:
        return False

    def logps(self, inputs: Inputs, responses: Responses, role: str = "policy", *, temperature: float = 1.0) -> Tensor:
        model = self.policy if role == "policy" else self.reference
        with torch.set_grad_enabled(torch.is_grad_enabled() and role == "policy"):
            return token_logps(model(inputs, responses), model.head, responses.ids, 64, temperature=temperature)

    def scores(self, inputs: Inputs, responses: Responses) -> tuple[Tensor, Tensor]:
        counts = [((responses.ids == token) & responses.mask).sum(1).float() for token in (GOOD, BAD)]
        return counts[0], counts[1] - 0.5

    def values(self, inputs: Inputs, responses: Responses, which: str = "reward") -> Tensor:
        critic = self.critics[which]
        return critic.head(critic(inputs, responses)).squeeze(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, inputs: Inputs, samples: int, sampling: Any) -> Responses:
        inputs = inputs.repeat(samples)
        ids = torch.full((len(inputs), sampling.max_new_tokens), PAD)
        done = torch.zeros(len(inputs), dtype=torch.bool)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for t in range(sampling.max_new_tokens):
            states = self.policy(inputs, Responses(ids=ids[:, : t + 1], mask=mask[:, : t + 1]))[:, -1]
            drawn = torch.multinomial(torch.softmax(self.policy.head(states) / sampling.temperature, -1), 1).squeeze(1)
            ids[:, t] = torch.where(done, PAD, drawn)
            mask[:, t] = ~done
            done = done | (drawn == EOS)
        return Responses(ids=ids, mask=mask)

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters())

    def critic_parameters(self, which: str) -> list[nn.Parameter]:
        return list(self.critics[which].parameters())

    def _modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"policy": self.policy, **{f"{k}_critic": v for k, v in self.critics.items()}})

    def state_dict(self) -> dict[str, Tensor]:
        return self._modules().state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._modules().load_state_dict(state)

    def save_policy(self, folder: str | Path) -> None:
        torch.save(self.policy.state_dict(), Path(folder) / "policy.pt")


def arguments(output_dir: Path | str, **changes: Any) -> OnlineArguments:
    defaults: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": 9,
        "per_device_train_batch_size": 3,
        "num_generations": 2,
        "num_ppo_epochs": 2,
        "mini_batch_size": 4,
        "learning_rate": 0.01,
        "critic_learning_rate": 0.01,
        "max_new_tokens": 5,
        "save_steps": 2,
        "disable_tqdm": True,
    }
    return OnlineArguments(**(defaults | changes))


def trainer(output_dir: Path | str, algorithm: Any = None, dual: Any = None, **changes: Any) -> OnlineTrainer:
    """A trainer on fake roles; `roles`, `scorer`, `demonstrations` and `prompts` may be given beside arguments."""
    measure, patience = changes.pop("measure", MEAN), changes.pop("multiplier_patience", 50)
    known = ("scorer", "demonstrations", "accelerator")
    own = {name: changes.pop(name) for name in known if name in changes}
    roles, prompts = changes.pop("roles", None) or FakeRoles(), changes.pop("prompts", PROMPTS)
    algorithm = algorithm or PPOLag(threshold=-0.2, window=16)
    constraint = algorithm.constraint(dual or LogDual(0.1, 1.0, 5.0), measure, patience)
    return OnlineTrainer(roles, algorithm, constraint, prompts, arguments(output_dir, **changes), **own)


DEMONSTRATIONS = [(PROMPTS[0], "5 5"), (PROMPTS[1], "5"), (PROMPTS[2], "5 2 5")]
KILL_POINTS = {
    "update": (optimization.Updater, "update"),
    "weights": (checkpoint, "save_file"),
    "optimizers": (checkpoint.torch, "save"),
    "sync": (checkpoint, "_sync"),
    "rename": (checkpoint.os, "replace"),
    "prune": (checkpoint, "prune"),
    "log": (runtime.MetricsLog, "write"),
    "finish": (online.checkpoint, "atomic_directory"),
}


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(output_dir: str, kill: tuple[str, int] | None = None, torn: bool = False, **changes: Any) -> None:
    """A whole run, resumed if there is anything to resume; kill=(point, n) ends it by SIGKILL at the n-th call there.

    torn: the call is begun first, and leaves half a file.
    """
    torch.set_num_threads(1)
    if kill is not None:
        owner, name = KILL_POINTS[kill[0]]
        real, calls = getattr(owner, name), [0]

        def fatal(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == kill[1]:
                if torn:
                    _tear(real, args, kwargs)
                _die()
            return real(*args, **kwargs)

        setattr(owner, name, fatal)
    trainer(output_dir, demonstrations=DEMONSTRATIONS, ptx_coeff=0.1, **changes).train(resume_from_checkpoint=True)


def _tear(real: Any, args: Any, kwargs: Any) -> None:
    """Let the call write, then cut the file it wrote in half."""
    real(*args, **kwargs)
    path = args[0].path if isinstance(args[0], runtime.MetricsLog) else Path(args[1])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - (7 if path.suffix == ".jsonl" else path.stat().st_size // 2))


def run_rank(rank: int, processes: int, port: int, output_dir: str, **changes: Any) -> None:
    """One of several ranks of a run, talking over gloo; leaves its parameters in rank-<n>.pt."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    run = trainer(output_dir, **changes)
    run.train(resume_from_checkpoint=True)
    state = {name: value.clone() for name, value in run.roles.state_dict().items()}
    seen = {"multiplier": run.constraint.multiplier, "costs": list(run.constraint.costs)}
    torch.save(seen | state, Path(output_dir) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()
