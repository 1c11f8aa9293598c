from __future__ import annotations

from beavertails_v import Comparison, Picture, Prompt, Response, audit, leakage


def prompt(text: str, *pictures: bytes) -> Prompt:
    return Prompt(text=text, images=tuple(map(Picture.from_bytes, pictures)))


def test_leakage_by_picture_question_and_prompt() -> None:
    train = [prompt("What is it?", b"a"), prompt("Where?", b"b"), prompt("Why?", b"c", b"c"), prompt("Why?", b"d")]
    evaluation = [prompt("what  is it?", b"b"), prompt("Why?", b"c", b"c"), prompt("Who?", b"e")]
    found = leakage(train, evaluation)
    assert sorted(found.pictures.values()) == [((1,), (0,)), ((2,), (1,))]
    assert found.questions == {"what is it?": ((0,), (0,)), "why?": ((2, 3), (1,))}
    assert list(found.prompts.values()) == [((2,), (1,))]
    assert found.train_rows == (1, 2)
    assert "pictures in both splits: 2 (2 training, 2 evaluation rows)" in found.summary()


def test_no_leakage() -> None:
    assert leakage([prompt("a", b"a")], [prompt("b", b"b")]).train_rows == ()


def test_audit_counts_agreement_of_each_preference_with_its_rates() -> None:
    def pair(
        harmless: tuple[int | None, int | None], helpful: tuple[int, int], safer: int, picture: bytes
    ) -> Comparison:
        first, second = (
            Response(text=t, safe=h is None or h >= 0, harmless_rate=h, helpful_rate=u)
            for t, h, u in zip("ab", harmless, helpful)
        )
        return Comparison(prompt=prompt("q", picture), responses=(first, second), more_helpful=0, safer=safer)

    counted = audit(
        [
            pair((1, -1), (3, 0), 0, b"a"),  # safer agrees, more helpful agrees
            pair((-1, 1), (0, 3), 0, b"a"),  # both contradict
            pair((0, 0), (1, 1), 1, b"b"),  # both tied
            pair((None, 1), (1, 1), 1, b"b"),  # safer ungraded, more helpful tied
            pair((1, 2), (2, 1), 1, b"b"),  # both agree
        ]
    )
    assert (counted.pairs, counted.prompts, counted.pictures) == (5, 2, 2)
    assert counted.safer == {"agrees": 2, "contradicts": 1, "tied": 1, "ungraded": 1}
    assert counted.more_helpful == {"agrees": 2, "contradicts": 1, "tied": 2}
    assert counted.safe_responses == 8  # of 10: each of the first two pairs has one unsafe
    assert counted.harmless_rates == {-1: 2, 0: 2, 1: 4, 2: 1}
    assert "5 pairs, 2 prompts, 2 pictures" in counted.summary()
