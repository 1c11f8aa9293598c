"""The traffic model, by hand."""

import pytest

from safe_rlhf_v.distributed.communication import Hardware, Traffic, Work, ddp, fsdp2, hybrid_seconds, seconds


def test_forwards_of_a_rollout_by_hand() -> None:
    work = Work(updates=2, steps=1, demonstrations=3)
    assert work.forwards == 7  # generation; policy, reference, reward, cost and two critics
    assert work.backwards == 3 * 2 + 3
    without = Work(updates=2, steps=1, critics=False, role_forwards=2)
    assert (without.forwards, without.backwards) == (1 + 2 * 4, 2)


def test_fsdp2_gathers_for_every_forward_and_backward_and_scatters_each_gradient() -> None:
    traffic = fsdp2(Work(updates=1, steps=1), language=10, gradients=4)
    assert traffic == Traffic(all_gather=10 * (7 + 2 * 3), reduce_scatter=4 * 3)
    assert traffic.on_the_wire(2) == (130 + 12) / 2
    assert traffic.on_the_wire(1) == 0


def test_ddp_reduces_once_an_optimizer_step_whatever_the_micro_batches() -> None:
    assert ddp(Work(updates=8, steps=2), gradients=5) == Traffic(all_reduce=5 * 3 * 2)
    assert ddp(Work(updates=8, steps=2), gradients=5).on_the_wire(4) == 2 * 30 * 3 / 4


@pytest.mark.parametrize(("link", "most"), [(1.0, "communication"), (1e6, "compute")])
def test_what_saturates_follows_from_the_link(link: float, most: str) -> None:
    work = Work(updates=1, steps=1)
    hardware = Hardware(flops=100.0, memory=1000.0, link=link)
    took = seconds(work, Traffic(all_gather=1000), hardware, 2, parameters=1, weights=2, rows=1, prompt=3, response=5)
    assert took.generation == 5 * 2 / 1000
    # six forwards at 8 tokens, one prompt of 3, three networks trained on 8
    assert took.compute == pytest.approx((2 * 8 * 6 + 2 * 3 + 6 * 8 * 3) / 100)
    assert took.communication == 500 / link and took.saturated == most


def test_between_nodes_only_shards_of_gradients_move() -> None:
    traffic = Traffic(all_gather=100, reduce_scatter=40)
    assert hybrid_seconds(traffic, gpus=4, nodes=1, inside=2.0, between=1.0) == 140 * 3 / 4 / 2
    assert hybrid_seconds(traffic, gpus=4, nodes=2, inside=2.0, between=1.0) == 140 * 3 / 4 / 2 + 2 * 10 / 2
