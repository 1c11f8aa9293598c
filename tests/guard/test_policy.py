"""The severity policy as data: decisions, and errors that name the field."""

from pathlib import Path

import pytest
import yaml

from beavertails_v.taxonomy import Taxonomy
from guard.policy import Policy, PolicyError

NAMES = Taxonomy.load().secondary
ZERO = dict.fromkeys(NAMES, 0.0)


def with_rules(**changes: object) -> dict:
    data = Policy.load().model_dump()
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = data
        for parent in parents:
            node = node[parent]
        node[last] = value
    return data


def test_default_is_valid_for_the_shipped_taxonomy() -> None:
    policy = Policy.load(categories=NAMES)
    assert policy.decide("query", 0.2, (0.2, 0.1, 0.05), ZERO).action == "allow"
    assert policy.decide("query", 0.5, (0.2, 0.1, 0.05), ZERO).action == "refuse"
    assert policy.decide("response", 0.5, (0.2, 0.1, 0.05), ZERO).action == "regenerate"
    decision = policy.decide("response", 0.1, (0.5, 0.4, 0.3), ZERO)
    assert decision.flagged and decision.action == "regenerate" and decision.reason == "severe 0.3 >= 0.25"


def test_strictest_rule_wins_and_allow_only_flags() -> None:
    rules = {
        "unsafe": {"threshold": 0.5, "action": "regenerate"},
        "minor": {"threshold": 0.3, "action": "allow"},
        "severe": {"threshold": 0.5, "action": "refuse"},
    }
    policy = Policy.parse(with_rules(response__rules=rules))
    assert policy.decide("response", 0.9, (0.9, 0.9, 0.9), {}).action == "refuse"
    assert policy.decide("response", 0.9, (0.9, 0.9, 0.1), {}).action == "regenerate"
    only_minor = policy.decide("response", 0.1, (0.4, 0.1, 0.1), {})
    assert only_minor.flagged and only_minor.action == "allow"


def test_category_rules_replace_by_name_for_the_categories_that_apply() -> None:
    own = {"animal_abuse": {"unsafe": {"threshold": 0.9, "action": "regenerate"}}}
    policy = Policy.parse(
        with_rules(response__categories=own, response__rules={"unsafe": {"threshold": 0.5, "action": "refuse"}})
    )
    decide = lambda unsafe, **p: policy.decide("response", unsafe, (0, 0, 0), {**ZERO, **p}).action  # noqa: E731
    assert decide(0.6, animal_abuse=0.8) == "allow"  # looser, and it is the only one that applies
    assert decide(0.95, animal_abuse=0.8) == "regenerate"
    # another one applies: the base rules
    assert decide(0.6, animal_abuse=0.8, hacking_or_digital_crime=0.7) == "refuse"
    assert decide(0.6, animal_abuse=0.1, hacking_or_digital_crime=0.4) == "refuse"  # not the top one, below 0.5


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (with_rules(response__rules__severe={"threshold": 1.5, "action": "refuse"}), "response.rules.severe.threshold"),
        (with_rules(response__rules__severe={"threshold": 0.5, "action": "ban"}), "response.rules.severe.action"),
        (with_rules(response__rules__huge={"threshold": 0.5, "action": "refuse"}), "response.rules.huge"),
        (with_rules(query__rules__minor={"threshold": 0.5, "action": "regenerate"}), "rules.minor.action"),
        (with_rules(query__rules={}), "query.rules"),
        (with_rules(treshold=0.5), "treshold"),
        (with_rules(version=2), "version"),
        ({"query": {"rules": {}}}, "response"),
        (["not a mapping"], "top level"),
    ],
)
def test_errors_name_the_file_and_the_field(tmp_path: Path, data: object, field: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    assert field in str(error.value) and "mine.yaml" in str(error.value)


def test_unknown_category_names_the_nearest() -> None:
    own = {"animal_abuze": {"unsafe": {"threshold": 0.2, "action": "refuse"}}}
    with pytest.raises(PolicyError, match="'query.categories.animal_abuze'.*did you mean 'animal_abuse'"):
        Policy.parse(with_rules(query__categories=own), categories=NAMES)


def test_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("query: [")
    with pytest.raises(PolicyError, match="bad.yaml: not valid YAML"):
        Policy.load(tmp_path / "bad.yaml")
    twice = yaml.safe_dump(with_rules()) + "query: {rules: {unsafe: {threshold: 1.0, action: allow}}}\n"
    (tmp_path / "bad.yaml").write_text(twice)  # read as YAML 1.1, the last one would flag nothing
    with pytest.raises(PolicyError, match="bad.yaml: .* the key 'query' stands twice"):
        Policy.load(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(PolicyError, match="bad.yaml: .*UTF-8"):
        Policy.load(tmp_path / "bad.yaml")


def test_save_and_load(tmp_path: Path) -> None:
    policy = Policy.load()
    policy.save(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml") == policy
    (tmp_path / "policy.json").write_text(policy.model_dump_json())
    assert Policy.load(tmp_path / "policy.json") == policy
