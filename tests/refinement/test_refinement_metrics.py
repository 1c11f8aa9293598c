from typing import Any

import pytest

from safe_rlhf_v.refinement.metrics import (
    accuracy_by_turn,
    average_turns,
    dialogue_refinement,
    refinement,
    refinement_intervals,
    refinement_ratio,
    regression_rate,
    score_error,
    turn_refinement,
    value_by_turn,
)
from safe_rlhf_v.statistics import Resampling, wilson

# T: 1 3 2 2 1; first wrong: 2 of 4 end right ... by hand below
DIALOGUES = [(9,), (2, 5, 8), (4, 3), (6, 10), (0,)]


def test_every_figure_by_hand() -> None:
    """T = 1 3 2 2 1, mean 1.8. Rises 0 6 -1 4 0: ADR 9/5. A turn: 6/2, -1/1, 4/1: ATR (3 - 1 + 4)/3 = 2.
    First wrong (< 8): 2, 4, 6, 0; of these 2 and 6 end right: RR 2/4. One of five falls: 1/5."""
    found = refinement(DIALOGUES, baseline=[(1, 2, 3), (1, 2, 3)])
    assert found.dialogues == 5
    assert found.turns == pytest.approx(1.8)
    assert found.average_turns == pytest.approx(1.8 / 3)
    assert found.adr == pytest.approx(1.8)
    assert found.atr == pytest.approx(2)
    assert found.rr == pytest.approx(0.5)
    assert found.regression_rate == pytest.approx(0.2)
    assert found.first_accuracy == pytest.approx(0.2)  # 9 alone
    assert found.accuracy == pytest.approx(0.6)  # 9, 8, 10
    assert found.unparsable_rate == pytest.approx(0.2)


def test_intervals_stand_around_the_figures() -> None:
    """RR is 2 of the 4 that begin wrong, one dialogue a prompt: Wilson's interval. Regression: 1 of 5."""
    found = refinement_intervals(DIALOGUES, "abcde", resampling=Resampling(draws=200))
    whole = refinement(DIALOGUES)
    assert {name: x.value for name, x in found.items()} == pytest.approx(
        {"adr": whole.adr, "atr": whole.atr, "rr": whole.rr, "regression_rate": whole.regression_rate}
    )
    assert (found["rr"].low, found["rr"].high) == pytest.approx(wilson(2, 4))
    assert (found["regression_rate"].low, found["regression_rate"].high) == pytest.approx(wilson(1, 5))
    assert found["adr"].low < found["adr"].value < found["adr"].high  # type: ignore[operator]
    assert (found["atr"].n, found["adr"].n) == (3, 5)


def test_intervals_of_figures_are_by_prompt() -> None:
    """Rises 0 and 4 of one prompt, 4 of another: prompt means 2 and 4. All right at once: neither ATR nor RR."""
    found = refinement_intervals([(5,), (2, 6), (2, 6)], "aab", resampling=Resampling(draws=200))
    assert (found["adr"].value, found["adr"].n) == (3.0, 2)
    assert set(refinement_intervals([(9,), (8,)], "ab")) == {"adr", "regression_rate"}


def test_a_dialogue_against_itself_has_average_turns_1() -> None:
    assert average_turns(DIALOGUES, DIALOGUES) == 1
    assert average_turns([(5, 6)], [(5, 6, 7, 8)]) == 0.5


def test_where_nothing_defines_a_figure_it_is_none() -> None:
    assert turn_refinement([(9,), (8,)]) is None
    assert refinement_ratio([(9,), (8,)]) is None
    assert refinement([(9,)]).average_turns is None
    assert (dialogue_refinement([(9,)]), regression_rate([(9,)])) == (0, 0)
    with pytest.raises(ValueError, match="no dialogues"):
        refinement([])


def test_the_bar_of_a_right_answer_moves() -> None:
    assert refinement_ratio([(4, 6)], correct=6) == 1
    assert refinement_ratio([(4, 6)], correct=7) == 0


def test_accuracy_by_turn_keeps_the_last_score() -> None:
    """Right after turn 1: 9 (1 of 5); after 2: 9, 10 (2 of 5); after 3: 9, 8, 10; after 4 the same."""
    found = accuracy_by_turn(DIALOGUES, "abcde", 4)
    assert [x.value for x in found] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    assert (found[1].low, found[1].high) == wilson(2, 5)  # one dialogue a prompt: Wilson's interval


def test_intervals_are_by_prompt() -> None:
    """Two dialogues of one prompt are one piece of evidence."""
    found = accuracy_by_turn([(9,), (9,), (1,), (1,)], ["a", "a", "b", "b"], 1)[0]
    assert (found.value, found.n) == (0.5, 2)
    values = value_by_turn([[0, 2], [1], [3, 1]], ["a", "a", "b"], 2, (0, 3), Resampling(draws=100))
    assert [v.value for v in values] == [1.75, 1.25]  # ((0+1)/2 + 3)/2; ((2+1)/2 + 1)/2


def test_score_error_by_hand() -> None:
    """|5-5|, |3-1|, |10-2| (unparsed counts as 10), |9-10|: 11/4. Read: 3/3. Same side of 8: yes, yes, no, yes."""
    found = score_error([5, 3, 0, 9], [5, 1, 2, 10])
    assert found.mae == pytest.approx(11 / 4)
    assert found.mae_parsed == pytest.approx(1)
    assert (found.exact, found.right_or_wrong, found.unparsed) == (0.25, 0.75, 0.25)


def test_score_correlation() -> None:
    rising = score_error([1, 2, 4, 8], [1, 4, 5, 10])
    assert rising.spearman == pytest.approx(1)
    # means 3.75 and 5; products -2.75*-4 + -1.75*-1 + 0 + 4.25*5 = 34; squares 28.75 and 42
    assert rising.pearson == pytest.approx(34 / (28.75 * 42) ** 0.5)
    constant = score_error([5, 5], [1, 9])
    assert (constant.pearson, constant.spearman) == (None, None)
    assert score_error([0], [3]).mae_parsed is None


@pytest.mark.parametrize("wrong", [([], []), ([1], [1, 2])])
def test_score_error_wants_pairs(wrong: Any) -> None:
    with pytest.raises(ValueError, match="need as many"):
        score_error(*wrong)
