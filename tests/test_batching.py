"""Which rows go through a pass together, and that it does not show in what comes out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_rlhf_v.online.micro_batches import (
    MicroBatches,
    OutOfMemory,
    RowSizes,
    by_parts,
    sizes_of,
    stitch,
    trim,
    truncate,
)
from safe_rlhf_v.types import Inputs, Responses


def rows(prompts: list[int], responses: list[int]) -> tuple[Inputs, Responses]:
    """Rows of these lengths: prompt tokens count up from 10, response tokens from 50."""
    width, length = max(prompts) + 2, max(responses) + 1  # columns that are pads in every row, too
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width, dtype=torch.long)
    for i, n in enumerate(prompts):
        ids[i, width - n :], mask[i, width - n :] = torch.arange(n) + 10, 1
    said = torch.arange(length) < torch.tensor(responses)[:, None]
    inputs = Inputs(input_ids=ids, attention_mask=mask, token_extras={"kinds": mask * 3}, vision=({},) * len(prompts))
    return inputs, Responses(ids=(torch.arange(length) + 50) * said, mask=said)


def sizes(prompts: list[int], responses: list[int], prompt_of: list[int] | None = None) -> RowSizes:
    return RowSizes(prompts=prompts, responses=responses, prompt_of=prompt_of or range(len(prompts)))


def test_without_a_bound_all_rows_go_together_in_their_order() -> None:
    assert MicroBatches().plan(sizes([3, 9, 1], [1, 1, 5])) == [[0, 1, 2]]
    assert MicroBatches(rows=3).plan(sizes([3, 9, 1], [1, 1, 5])) == [[0, 1, 2]]
    assert MicroBatches(tokens=100).plan(sizes([3, 9, 1], [1, 1, 5])) == [[0, 1, 2]], "also where they fit a budget"


def test_rows_of_like_length_stand_together_the_longest_first() -> None:
    # totals 4, 10, 6, 9: two by two, 1 and 3 before 2 and 0
    assert MicroBatches(rows=2).plan(sizes([3, 9, 1, 8], [1, 1, 5, 1])) == [[1, 3], [2, 0]]


def test_a_budget_counts_pads() -> None:
    # The longest, 6 + 4, is alone: with 5 + 1 it would be 2 * (6 + 4) = 20. Then 2 * (5 + 1) = 12; a third would be 18.
    assert MicroBatches(tokens=16).plan(sizes([5, 6, 5, 2], [1, 4, 1, 1])) == [[1], [0, 2], [3]]
    # widest prompt and widest response may come from two rows: 2 * (9 + 8) = 34
    assert MicroBatches(tokens=33).plan(sizes([9, 1], [1, 8])) == [[0], [1]]
    assert MicroBatches(tokens=34).plan(sizes([9, 1], [1, 8])) == [[0, 1]]
    assert MicroBatches(tokens=3).plan(sizes([9, 1], [1, 8])) == [[0], [1]], "a row over the bound is a part of its own"


def test_samples_of_a_prompt_stand_together_where_that_is_fewer_tokens() -> None:
    # By length: [0, 2], [1, 3], each 2 * 9 + 2 * (4 or 2). By prompt, [0, 1], [2, 3]: each 9 + 2 * 4.
    rows = [9, 9, 9, 9], [4, 2, 4, 2]
    assert MicroBatches(rows=2).plan(sizes(*rows, [0, 0, 1, 1])) == [[0, 1], [2, 3]]
    assert MicroBatches(rows=2).plan(sizes(*rows)) == [[0, 2], [1, 3]], "where each row reads its own"
    # By length: [0, 2], [1, 3] are 2 * 1 + 2 * 40 and 2 * 1 + 2 * 2. By prompt, 1 + 2 * 40 twice.
    assert MicroBatches(rows=2).plan(sizes([1, 1, 1, 1], [40, 2, 40, 2], [0, 0, 1, 1])) == [[0, 2], [1, 3]]


def test_a_budget_counts_what_is_held_of_every_row() -> None:
    """Keys and values of a prompt are repeated for each of its samples, whoever reads it."""
    of = sizes([9, 9, 9, 5], [4, 4, 4, 1], [0, 0, 0, 1])
    assert MicroBatches(tokens=39).plan(of) == [[0, 1, 2], [3]]
    assert MicroBatches(tokens=38).plan(of) == [[0, 1], [2, 3]]
    assert MicroBatches(tokens=52).plan(of) == [[0, 1, 2, 3]], "4 * (9 + 4)"


def test_rows_share_a_prompt_where_the_model_reads_it_once() -> None:
    inputs, responses = rows([3, 3, 2], [1, 2, 3])
    assert list(sizes_of(inputs, responses, read_once=False).prompt_of) == [0, 1, 2]
    of = sizes_of(inputs, responses, read_once=True)  # rows without pictures that read tokens 10, 11, 12 and 10, 11
    assert (of.prompts, of.responses, of.prompt_of) == ([3, 3, 2], [1, 2, 3], [0, 0, 1])
    assert of.computed_tokens([0, 1]) == 3 + 2 * 2 and of.computed_tokens([1, 2]) == 2 * 3 + 2 * 3
    assert of.kept_tokens([0, 1]) == 2 * (3 + 2) and of.kept_tokens([1, 2]) == 2 * (3 + 3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=12),
    st.none() | st.integers(1, 6),
    st.none() | st.integers(1, 60),
)
def test_every_row_is_in_one_part_and_no_part_is_over_a_bound(
    found: list[tuple[int, int, int]], most: int | None, tokens: int | None
) -> None:
    of = sizes([p for p, _, _ in found], [r for _, r, _ in found], [k for _, _, k in found])
    parts = MicroBatches(rows=most, tokens=tokens).plan(of)
    assert sorted(i for part in parts for i in part) == list(range(len(found)))
    for part in parts:
        assert most is None or len(part) <= most
        assert tokens is None or len(part) == 1 or of.kept_tokens(part) <= tokens


def test_answers_come_back_in_the_rows_order() -> None:
    """A look that says of each row what it reads: sums of its own tokens, and its response tokens one by one."""
    inputs, responses = rows([3, 7, 2, 5, 7], [4, 1, 6, 2, 3])
    seen: list[tuple[int, int]] = []

    def look(part: list[int], inputs: Inputs, responses: Responses) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((inputs.input_ids.shape[1], responses.ids.shape[1]))
        assert torch.equal(inputs.token_extras["kinds"], inputs.attention_mask * 3)
        return inputs.input_ids.sum(1) + 1000 * torch.tensor(part), responses.ids.float()

    whole = by_parts(look, inputs, responses, MicroBatches(), read_once=False)
    parts = by_parts(look, inputs, responses, MicroBatches(rows=2), read_once=False)
    assert torch.equal(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1]) and parts[1].shape == responses.ids.shape
    # all as they are; then rows 4, 1 (totals 10, 8), 2, 0 (8, 7) and 3 (7), cut to their own widest
    assert seen == [(9, 7), (7, 3), (3, 6), (5, 2)]


def test_trimming_takes_pads_alone() -> None:
    inputs, responses = rows([3, 2], [2, 4])
    left, right = trim(inputs, responses)
    assert left.input_ids.tolist() == [[10, 11, 12], [0, 10, 11]]
    assert right.ids.tolist() == [[50, 51, 0, 0], [50, 51, 52, 53]] and right.mask.sum(1).tolist() == [2, 4]
    assert truncate(responses, 1).ids.tolist() == [[50], [50]]


def test_stitching_fills_what_a_part_has_not() -> None:
    parts, answers = [[2, 0], [1]], [torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6, 7]])]
    assert stitch(parts, answers, 3, value=9).tolist() == [[3, 4, 9], [5, 6, 7], [1, 2, 9]]
    masks = [torch.tensor([[True], [True]]), torch.tensor([[True, True]])]
    assert stitch(parts, masks, 2).tolist() == [[True, False], [True, True], [True, False]]


class Memory:
    """Has room for `room` rows; tells how many rows each attempt was made with."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error, self.tried = room, error, []

    def work(self, parts: list[list[int]]) -> int:
        for part in parts:
            self.tried.append(len(part))
            if len(part) > self.room:
                raise self.error
        return sum(map(len, parts))


OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT)
def test_memory_that_runs_out_halves_the_rows_for_good(error: Exception) -> None:
    batches, memory = MicroBatches(), Memory(2, error)
    assert batches.run(sizes([4] * 10, [1] * 10), memory.work) == 10
    assert memory.tried == [10, 5, 2, 2, 2, 2, 2] and batches.halved == 2
    assert batches.run(sizes([4] * 3, [1] * 3), memory.work) == 3
    assert memory.tried[-2:] == [2, 1], "the next pass does not try what is known to fail"


def test_a_single_row_that_does_not_fit_is_an_error_with_a_way_out() -> None:
    with pytest.raises(OutOfMemory, match=r"one sample.*policy\.gradient_checkpointing"):
        MicroBatches().run(sizes([4, 4], [1, 1]), Memory(0, OUT[0]).work)


def test_other_errors_are_not_taken_for_it() -> None:
    memory = Memory(0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatches().run(sizes([4, 4], [1, 1]), memory.work)
    assert memory.tried == [2]
