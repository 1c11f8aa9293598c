import dataclasses
import importlib
from pathlib import Path

import pytest

from safe_rlhf_v import cost_measures, duals
from safe_rlhf_v.config import Settings, SettingsError, load_settings, walk


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_papers() -> None:
    settings = load_settings()
    # The released Safe RLHF-V scripts: RM and CM lr 3e-5, 3 epochs, 4 pairs; beta .02, lambda 10 up to 20, d -0.5.
    assert (settings.reward.learning_rate, settings.cost.num_train_epochs) == (3e-5, 3)
    assert (settings.reward.lr_scheduler_type, settings.cost.lr_scheduler_type) == ("constant_with_warmup", "cosine")
    policy = settings.policy
    assert (policy.beta, policy.threshold, policy.learning_rate) == (0.02, -0.5, 5e-7)
    assert (policy.dual.kind, policy.dual.initial, policy.dual.maximum, policy.dual.lr) == ("log", 10, 20, 0.1)


def test_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {path: a}\nreward:\n  learning_rate: 1e-4\n  max_steps: 7\n")
    settings = load_settings(path, ["reward.max_steps=9", "policy.threshold=auto", "data.keep=[empty]", "cost.bf16=on"])
    assert settings.model.path == "a"
    assert settings.reward.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as a string
    assert settings.reward.max_steps == 9
    assert settings.policy.threshold == "auto"
    assert settings.data.keep == ["empty"]
    assert settings.cost.bf16 is True


def test_override_values_may_hold_equal_signs_and_null() -> None:
    settings = load_settings(None, ["model.path=a=b", "model.max_response_length=null"])
    assert settings.model.path == "a=b"
    assert settings.model.max_response_length is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("reward: {learning_rat: 1}", ["reward.learning_rat", "did you mean 'reward.learning_rate'"]),
        ("rewards: {learning_rate: 1}", ["unknown key 'rewards'", "did you mean 'reward'"]),
        ("policy: {lr: 1}", ["policy.lr", "did you mean 'policy.dual.lr'"]),
        ("policy: {dual: {start: 1}}", ["policy.dual.start"]),
        ("reward: {learning_rate: fast}", ["reward.learning_rate = 'fast'", "valid number"]),
        ("reward: {learning_rate: 0}", ["reward.learning_rate = 0", "greater than 0"]),
        ("reward: {max_steps: 1.5}", ["reward.max_steps = 1.5", "integer"]),
        ("policy: {algorithm: ppo-lag}", ["'crpo' or 'p3o'", "did you mean 'ppo_lag'"]),
        ("policy: {algorithm: group_lag}", ["num_generations must be at least 2"]),
        ("policy: {algorithm: rloo_lag}", ["num_generations must be at least 2 for algorithm rloo_lag"]),
        ("policy: {algorithm: repo, measure: {kind: cvar}}", ["measure.kind cvar", "use measure.kind: mean"]),
        ("policy: {threshold: low}", ["policy.threshold = 'low': should be a valid number", "or should be 'auto'"]),
        ("policy: {dual: {initial: 30}}", ["policy.dual", "initial 30 is above maximum 20"]),
        ("policy: {dual: {kind: log, initial: 0}}", ["initial must be above 0 for kind log"]),
        ("reward: {max_steps: true}", ["reward.max_steps = True", "true / false"]),
        ("reward: 3", ["reward = 3"]),
        ("reward: {bf16: true}\nreward: {bf16: false}", ["line 1", "'reward' stands twice"]),
        ("- a", ["a mapping of sections"]),
        ("a: [", ["run.yaml"]),
    ],
)
def test_errors_name_file_key_value_and_way_out(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_errors_of_overrides_name_the_override() -> None:
    with pytest.raises(SettingsError, match=r"override 'policy.betta=1'.*did you mean 'policy.beta'"):
        load_settings(None, ["policy.betta=1"])
    with pytest.raises(SettingsError, match="section.key=value"):
        load_settings(None, ["policy.beta"])


def test_missing_file() -> None:
    with pytest.raises(SettingsError, match=r"none\.yaml: no such settings file"):
        load_settings("none.yaml")


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    settings = load_settings(None, ["policy.threshold=auto", "model.quantization=4bit", "seed=3"])
    settings.save(tmp_path / "out" / "settings.yaml")
    assert load_settings(tmp_path / "out" / "settings.yaml") == settings


def test_runs_do_not_share_sections() -> None:
    first, second = load_settings(), load_settings()
    first.policy.dual.initial = 3
    assert second.policy.dual.initial == 10


def test_assignment_is_checked() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        load_settings().policy.max_steps = 0


ALGORITHMS = {
    "ppo_lag": "PPOLag",
    "group_lag": "GroupLag",
    "rloo_lag": "RLOOLag",
    "repo": "RePO",
    "crpo": "CRPO",
    "p3o": "P3O",
}
DIRECT = {
    "dpo": "DPO", "kto": "KTO", "sacpo": "SACPO", "safe_dpo": "SafeDPO", "bfpo": "BFPO", "c_dpo": "CDPO",
    "mm_dpo": "MMDPO",
}  # fmt: skip
DUALS = {"log": "LogDual", "additive": "AdditiveDual", "augmented": "AugmentedDual", "pid": "PIDDual"}
MEASURES = {"high_confidence": "HighConfidence", "cvar": "CVaR"}


@pytest.mark.parametrize(("name", "algorithm"), ALGORITHMS.items())
def test_sections_mirror_the_algorithms(name: str, algorithm: str) -> None:
    """Every field of an algorithm is a setting with the same default; threshold and beta are the policy section's."""
    fields = dataclasses.fields(getattr(importlib.import_module(f"safe_rlhf_v.algorithms.{name}"), algorithm))
    defaults = {f.name: f.default for f in fields if f.name not in ("threshold", "beta")}
    assert getattr(load_settings().policy, name).model_dump() == defaults


@pytest.mark.parametrize(("name", "algorithm"), DIRECT.items())
def test_sections_mirror_the_direct_algorithms(name: str, algorithm: str) -> None:
    """The same; beta is the direct section's, and allow_contradictory follows data.keep."""
    fields = dataclasses.fields(getattr(importlib.import_module(f"safe_rlhf_v.algorithms.{name}"), algorithm))
    defaults = {f.name: f.default for f in fields}
    assert load_settings().direct.beta == defaults.pop("beta")
    defaults.pop("allow_contradictory", None)
    assert getattr(load_settings().direct, name).model_dump() == defaults


@pytest.mark.parametrize(("kind", "rule"), DUALS.items())
def test_sections_mirror_the_duals(kind: str, rule: str) -> None:
    section = load_settings().policy.dual
    fields = dataclasses.fields(getattr(duals, rule))
    values = section.pid if kind == "pid" else section
    assert {f.name: getattr(values, f.name) for f in fields} == {f.name: f.default for f in fields}


@pytest.mark.parametrize(("kind", "measure"), MEASURES.items())
def test_sections_mirror_the_measures(kind: str, measure: str) -> None:
    section = load_settings(None, [f"policy.measure.kind={kind}"]).policy.measure
    for field in dataclasses.fields(getattr(cost_measures, measure)):
        assert getattr(section, field.name) == field.default


def test_a_fixed_multiplier_has_no_maximum() -> None:
    assert load_settings(None, ["policy.dual.kind=fixed", "policy.dual.initial=30"]).policy.dual.initial == 30


def test_every_setting_is_described() -> None:
    assert [name for name, info in walk(Settings) if not info.description] == []


FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - set(FOLDER.glob("compare*.yaml")))  # tests/cli reads those


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_are_valid(path: Path) -> None:
    load_settings(path)


def test_a_setting_that_adapters_would_ignore_is_refused() -> None:
    assert not load_settings(None, ["sft.freeze_vision=false"]).sft.freeze_vision
    with pytest.raises(SettingsError, match="freeze_vision: false needs use_lora: false"):
        load_settings(None, ["reward.freeze_vision=false"])
