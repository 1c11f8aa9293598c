"""A run killed at any moment and resumed ends bit for bit where the unbroken run ends."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import fake_roles
import pytest
import torch
from forks import CONTEXT, serve
from safetensors.torch import load_file

from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.training import checkpoint
from safe_rlhf_v.training.runtime import read_metrics


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    serve("fake_roles")


def on_two_ranks(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """A run on two ranks; what each holds at its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        CONTEXT.Process(target=fake_roles.run_rank, args=(rank, 2, port, str(folder)), kwargs=changes)
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


def in_a_process(*args: Any, **kwargs: Any) -> int:
    process = CONTEXT.Process(target=fake_roles.run, args=args, kwargs=kwargs)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def outcome(folder: Path) -> dict[str, Any]:
    """Everything a run leaves that may not depend on whether it was broken."""
    last = checkpoint.latest_checkpoint(folder)
    assert last is not None
    state = json.loads((last / checkpoint.STATE).read_text())
    state["settings"]["arguments"].pop("output_dir")
    metrics = read_metrics(folder / "metrics.jsonl")
    for row in metrics:
        row.pop("seconds")
    return {"checkpoint": last.name, "state": state, "metrics": metrics}


def assert_same_end(broken: Path, unbroken: Path) -> None:
    assert outcome(broken) == outcome(unbroken)
    last = outcome(broken)["checkpoint"]
    weights = [load_file(folder / last / checkpoint.WEIGHTS) for folder in (broken, unbroken)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    policies = [torch.load(folder / "policy" / "policy.pt") for folder in (broken, unbroken)]
    assert all(torch.equal(policies[0][name], policies[1][name]) for name in policies[0])
    assert [row["step"] for row in outcome(broken)["metrics"]] == list(range(1, 10))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert in_a_process(str(folder)) == 0
    return folder


@pytest.mark.parametrize(
    ("point", "call", "torn"),
    [
        ("update", 1, False),  # before any checkpoint: the run starts anew
        ("update", 4, False),  # between two checkpoints
        ("update", 5, False),  # right after one
        ("log", 5, False),
        ("log", 6, True),  # half a line of metrics.jsonl
        ("weights", 1, True),  # half of the first checkpoint's weights
        ("optimizers", 3, True),  # half of a later one's optimizer states
        ("sync", 9, False),  # written, not yet on the disk
        ("rename", 5, False),  # whole, without its name
        ("prune", 3, False),  # two checkpoints stand
        ("finish", 6, False),  # trained, the policy not yet saved
    ],
)
def test_mistake_6_killed_run_resumes_bit_for_bit(
    unbroken: Path, tmp_path: Path, point: str, call: int, torn: bool
) -> None:
    assert in_a_process(str(tmp_path), kill=(point, call), torn=torn) == -signal.SIGKILL
    assert in_a_process(str(tmp_path)) == 0
    assert_same_end(tmp_path, unbroken)


def test_mistake_6_killed_again_and_again(unbroken: Path, tmp_path: Path) -> None:
    for point, call in (("update", 4), ("weights", 1), ("update", 3), ("sync", 3), ("log", 2)):
        assert in_a_process(str(tmp_path), kill=(point, call)) == -signal.SIGKILL
    assert in_a_process(str(tmp_path)) == 0
    assert_same_end(tmp_path, unbroken)


def test_two_ranks_share_costs_multiplier_and_gradients(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, max_steps=3, algorithm=PPOLag(threshold=-0.2, window=128))
    assert first["multiplier"] == second["multiplier"] != 1.0
    assert len(first["costs"]) == 3 * 2 * 6 and first["costs"] == second["costs"]
    assert first["costs"][:6] != first["costs"][6:12]  # the ranks sample on their own
    names = first.keys() - {"multiplier", "costs"}
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_two_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    whole = on_two_ranks(tmp_path / "whole", max_steps=4)
    on_two_ranks(tmp_path / "parts", max_steps=2)
    parts = on_two_ranks(tmp_path / "parts", max_steps=4)
    for one, other in zip(whole, parts, strict=True):
        names = one.keys() - {"multiplier", "costs"}
        assert all(torch.equal(one[name], other[name]) for name in names)
        assert one["multiplier"] == other["multiplier"] and one["costs"] == other["costs"]
