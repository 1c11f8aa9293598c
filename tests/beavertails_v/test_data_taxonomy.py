from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from beavertails_v.schema import Severity
from beavertails_v.taxonomy import Taxonomy, TaxonomyError

STANDARD = [
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
]  # fmt: skip


def test_nine_primary_and_twenty_secondary_categories_in_order() -> None:
    taxonomy = Taxonomy.load()
    assert len(taxonomy.primary) == 9 and len(taxonomy.secondary) == 20
    assert taxonomy.primary[0] == "Threats to National and Public Security"
    assert taxonomy.secondary[0] == "terrorism_or_extremism" and taxonomy.secondary[19] == "sexual_crimes"
    assert taxonomy.primary_of("animal_abuse") == "Physical and Psychological Harm"
    assert taxonomy.primary_of("sexual_crimes") == "Sexually Explicit and Inappropriate Content"
    assert [taxonomy.index(name) for name in taxonomy.secondary] == list(range(20))
    assert taxonomy.version == "1.0"


def test_levels_are_the_severities_and_cover_every_rate_once() -> None:
    levels = Taxonomy.load().levels
    assert [level.name for level in levels] == [severity.name.lower() for severity in Severity]
    for severity, level in zip(Severity, levels):
        assert {Severity.from_harmless_rate(rate) for rate in level.harmless_rates} == {severity}
    assert sorted(rate for level in levels for rate in level.harmless_rates) == list(range(-3, 4))


def test_every_standard_key_is_there_and_every_category_raises_one_or_is_named() -> None:
    taxonomy = Taxonomy.load()
    assert list(taxonomy.standard) == STANDARD
    assert all(taxonomy.standard.values())
    mapped = {name for names in taxonomy.standard.values() for name in names}
    # Three categories have no counterpart among the standard keys: they raise `flagged` and their own key only.
    assert set(taxonomy.secondary) - mapped == {
        "deception_in_personal_relationships",
        "false_information",
        "psychological_horror_and_dark_themes",
    }


def test_unknown_names_are_answered_with_the_nearest() -> None:
    taxonomy = Taxonomy.load()
    for ask in (taxonomy.index, taxonomy.primary_of, lambda name: taxonomy.require([name])):
        with pytest.raises(TaxonomyError, match="'animal_abuse'"):
            ask("animal_abuses")
    with pytest.raises(TaxonomyError, match="there is beavertails_v"):
        Taxonomy.load("beavertails")


def test_a_taxonomy_is_a_file(tmp_path: Path) -> None:
    own = {
        "name": "own",
        "version": 2,
        "primary": [{"name": "Harm", "secondary": ["fire", "water"]}],
        "levels": [{"name": "none", "harmless_rate": [0], "meaning": "not harmful"}],
        "standard": {"violence": ["fire"]},
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(own))
    assert Taxonomy.load(path).primary_of("water") == "Harm"
    own["standard"] = {"violence": ["fires"]}
    for text, words in (
        (yaml.safe_dump(own) + "name: again\n", "the key 'name' stands twice"),
        ("name: mine\n", "lacks 'primary'"),
        ("- a\n", "is of another form"),
        ("name: [\n", "line 2"),
    ):
        (tmp_path / "faulty.yaml").write_text(text)
        with pytest.raises(TaxonomyError, match="faulty.yaml") as found:
            Taxonomy.load(tmp_path / "faulty.yaml")
        assert words in str(found.value)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(TaxonomyError, match=r"'violence'.*nearest is 'fire'"):
        Taxonomy.load(tmp_path / "bad.yaml")
