import functools
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from safe_rlhf_v import config_io
from safe_rlhf_v.algorithms.cost_model import CostModel
from safe_rlhf_v.algorithms.p3o import P3O
from safe_rlhf_v.config import Settings, SettingsError, load_settings, walk
from safe_rlhf_v.cost_measures import MEAN, CVaR
from safe_rlhf_v.duals import AdditiveDual, AugmentedDual, LogDual, PIDDual, fixed


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
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
        ("policy: {algorithm: ppo-lag}", ["'p3o' or 'imitation'", "did you mean 'ppo_lag'"]),
        ("policy: {algorithm: group_lag}", ["num_generations must be at least 2"]),
        ("policy: {algorithm: rloo_lag}", ["num_generations must be at least 2 for algorithm rloo_lag"]),
        ("policy: {algorithm: repo, measure: {kind: cvar}}", ["measure.kind cvar", "use measure.kind: mean"]),
        ("policy: {threshold: low}", ["policy.threshold = 'low': should be a valid number", "or should be 'auto'"]),
        ("policy: {algorithm: repo, dual: {kind: log}}", ["dual.kind log", "only rises", "dual.kind: additive"]),
        (
            "policy: {algorithm: repo, dual: {kind: additive, initial: 20}}",
            ["dual.initial 20", "never falls", "begin lower"],
        ),
        ("policy: {algorithm: repo, repo: {form: per_prompt}}", ["num_generations must be at least 2", "not 1"]),
        ("policy: {algorithm: repo, repo: {margin: -1}}", ["policy.repo.margin"]),
        ("policy: {dual: {initial: 30}}", ["policy.dual", "initial 30 is above maximum 20"]),
        ("policy: {dual: {kind: log, initial: 0}}", ["initial must be above 0 for kind log"]),
        ("reward: {max_steps: true}", ["reward.max_steps = True", "true / false"]),
        ("reward: 3", ["reward = 3"]),
        ("reward: {bf16: true}\nreward: {bf16: false}", ["line 2", "'reward' stands twice"]),
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


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ([], ("additive", 0.0)),  # none is named: a rule that its violation, never below 0, can use, from 0
        (["policy.dual.lr=0.2", "policy.dual.maximum=15"], ("additive", 0.0)),
        (["policy.dual.initial=2"], ("additive", 2.0)),
        (["policy.repo.slack=0.1"], ("additive", 10.0)),
        (["policy.repo.slack=0.1", "policy.dual.kind=log"], ("log", 10.0)),  # with slack the log rule falls too
        (["policy.dual.kind=augmented"], ("augmented", 0.0)),
        (["policy.dual.kind=fixed"], ("fixed", 10.0)),
        (["policy.dual.kind=fixed", "policy.dual.initial=20"], ("fixed", 20.0)),
        (["policy.dual.kind=pid"], ("pid", 10.0)),
    ],
)
def test_repo_takes_a_rule_that_its_violation_can_move(changes: list[str], want: Any, tmp_path: Path) -> None:
    settings = load_settings(None, ["policy.algorithm=repo", *changes])
    assert (settings.policy.dual.kind, settings.policy.dual.initial) == want
    settings.save(tmp_path / "settings.yaml")
    assert load_settings(tmp_path / "settings.yaml") == settings
    assert load_settings().policy.dual.kind == "log"  # of all other algorithms
    load_settings(None, ["policy.max_steps=5"]).save(tmp_path / "base.yaml")  # a file that names no rule
    assert (
        load_settings(tmp_path / "base.yaml", ["policy.algorithm=repo", *changes]).policy.dual == settings.policy.dual
    )
    later = load_settings(None, changes)
    later.policy.repo = settings.policy.repo
    later.policy.algorithm = "repo"
    assert later.policy.dual == settings.policy.dual


@pytest.mark.parametrize(
    ("changes", "beta"),
    [
        (["policy.algorithm=group_lag"], 0.04),
        (["policy.algorithm=rloo_lag"], 0.05),
        (["policy.algorithm=rloo_lag", "policy.beta=0.3"], 0.3),
        (["policy.beta=0.3", "policy.algorithm=rloo_lag", "policy.beta=null"], 0.05),
        (["policy.algorithm=imitation"], 0.02),  # it has none: that of the first method
    ],
)
def test_a_method_has_its_own_beta_unless_one_is_named(changes: list[str], beta: float, tmp_path: Path) -> None:
    settings = load_settings(None, ["policy.num_generations=2", *changes])
    assert settings.policy.beta == beta
    settings.save(tmp_path / "settings.yaml")
    assert load_settings(tmp_path / "settings.yaml") == settings
    if "policy.beta=0.3" not in changes:  # who reads the file may take another method, with that one's beta
        later = load_settings(tmp_path / "settings.yaml", ["policy.algorithm=crpo"])
        assert later.policy.beta == 0.02
        settings.policy.algorithm = "crpo"
        assert settings.policy.beta == 0.02


def test_a_file_that_names_everything_is_taken_by_its_word(tmp_path: Path) -> None:
    """As runs wrote it before a method had a beta of its own."""
    dual = "{kind: log, lr: 0.1, rho: 1.0, initial: 10.0, maximum: 20.0}"
    text = f"{{algorithm: group_lag, num_generations: 2, beta: 0.02, threshold: -0.5, dual: {dual}}}"
    policy = load_settings(write(tmp_path, f"policy: {text}\n")).policy
    assert (policy.beta, policy.threshold, policy.made().beta) == (0.02, -0.5, 0.02)
    assert policy.rule() == LogDual()


def test_what_stands_in_another_section_is_no_key_of_a_method() -> None:
    for key, near in (("policy.ppo_lag.beta", "policy.beta"), ("direct.dpo.allow_contradictory", "")):
        with pytest.raises(SettingsError, match=rf"unknown key '{key}'.*{near}"):
            load_settings(None, [f"{key}=1"])


def test_a_method_is_made_of_its_section() -> None:
    changes = ["policy.p3o.kappa=7", "policy.p3o.window=3", "policy.beta=0.3", "policy.algorithm=p3o"]
    assert load_settings(None, changes).policy.made(threshold=-2.0) == P3O(kappa=7, window=3, beta=0.3, threshold=-2)
    cost = load_settings(None, ["cost.sign_weight=2", "cost.learning_rate=1e-3"]).cost
    assert cost.made(allow_contradictory=True) == CostModel(sign_weight=2, allow_contradictory=True)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        (["policy.dual.kind=augmented", "policy.dual.rho=3"], AugmentedDual(rho=3.0)),
        (["policy.dual.kind=pid", "policy.dual.pid.kp=2", "policy.dual.initial=30"], PIDDual(kp=2.0)),
        (["policy.dual.kind=fixed", "policy.dual.initial=3"], fixed(3.0)),
        (["policy.algorithm=crpo"], fixed(0.0)),  # it has no multiplier
        (["policy.algorithm=repo", "policy.dual.initial=0"], AdditiveDual(initial=0.0)),
    ],
)
def test_a_rule_is_made_of_its_section(changes: list[str], rule: Any) -> None:
    assert load_settings(None, changes).policy.rule() == rule


def test_a_measure_is_made_of_its_section() -> None:
    for changes, want in (([], MEAN), (["policy.measure.kind=cvar", "policy.measure.alpha=0.5"], CVaR(alpha=0.5))):
        assert load_settings(None, changes).policy.constraint(-1.0).measure == want


def test_settings_go_to_other_processes() -> None:
    settings = load_settings(None, ["policy.algorithm=repo", "policy.repo.margin=0.5", "guard.unsafe_weight=2"])
    there = pickle.loads(pickle.dumps(settings))
    assert there == settings
    there.policy.algorithm = "ppo_lag"  # what nobody named is still open there
    assert (there.policy.dual.kind, there.policy.repo.margin) == ("log", 0.5)


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


def test_text_stays_as_it_was_written(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "output_dir: 2024-06-01\nmodel: {path: 1e3, start: no}\n"
        "data: {path: 007, train_split: 0, evaluation_split: true, categories: [1_0, on, 3]}\n"
        "policy: {threshold: 1e-2}\niterative: {bounds: {all: 3, 12: 1e0}}\n",
    )
    settings = load_settings(path)
    assert (settings.output_dir, settings.model.path, settings.model.start) == ("2024-06-01", "1e3", "no")
    data = settings.data
    assert (data.path, data.train_split, data.evaluation_split) == ("007", "0", "true")
    assert data.categories == ["1_0", "on", "3"]
    assert settings.policy.threshold == 0.01
    assert settings.iterative.bounds == {"all": 3.0, "12": 1.0}
    settings.save(tmp_path / "saved.yaml")
    assert load_settings(tmp_path / "saved.yaml") == settings


@pytest.mark.parametrize(
    "text",
    ["20240601", "2024-06-01", "my data: v2", "a #1", "[x]", "{y}", "12:30:00", "no", "-", "&a", "*", "C:\\x", "é"],
)
def test_an_override_of_text_is_that_text(text: str) -> None:
    assert load_settings(None, [f"data.path={text}"]).data.path == text
    assert load_settings(None, [f"data.path='{text}'"]).data.path == text


@pytest.mark.parametrize("text", ["1:30", "2024-06-01", "10 000", "0b11"])
def test_a_number_is_not_guessed(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="reward.max_steps = '"):
        load_settings(write(tmp_path, f"reward: {{max_steps: {text}}}"))


def test_numbers_and_truth_values_as_people_write_them(tmp_path: Path) -> None:
    path = write(
        tmp_path, "reward: {max_steps: 1_000, save_steps: 012, logging_steps: 1e1, bf16: yes}\ncost: {bf16: on}"
    )
    reward = load_settings(path, ["cost.gradient_checkpointing=on"]).reward
    assert (reward.max_steps, reward.save_steps, reward.logging_steps, reward.bf16) == (1000, 12, 10, True)
    assert load_settings(path, ["cost.gradient_checkpointing=on"]).cost.gradient_checkpointing is True


def test_merge_keys_and_empty_sections(tmp_path: Path) -> None:
    path = write(
        tmp_path, "reward: &shared {max_steps: 5, learning_rate: 1e-3}\ncost: {<<: *shared, max_steps: 6}\nsft:\n"
    )
    settings = load_settings(path)
    assert (settings.cost.max_steps, settings.cost.learning_rate) == (6, 1e-3)
    assert settings.sft == load_settings().sft
    with pytest.raises(SettingsError, match="delete the line to take the default"):
        load_settings(write(tmp_path, "sft:\n  learning_rate:\n"))
    with pytest.raises(SettingsError, match="an alias"):
        load_settings(write(tmp_path, "sft: &a\n  b: *a\n"))


@pytest.mark.parametrize(
    "override",
    ["sft.learning_rate=.inf", "policy.threshold=.nan", "policy.dual.maximum=inf", "iterative.bounds={all: .nan}",
     "direct.bfpo.alpha=-.inf", "sft.weight_decay=1e999", "seed=99999999999"],
)  # fmt: skip
def test_what_is_not_a_finite_number_is_refused(override: str) -> None:
    with pytest.raises(SettingsError, match=r"finite number|less than 4294967296"):
        load_settings(None, [override])


PATHS = [
    "output_dir", "model.path", "model.start", "data.path", "data.columns", "guard.benign", "guard.path",
    "guard.policy",
    "policy.reward_model", "policy.cost_model", "direct.reference", "direct.reward_model", "direct.cost_model",
    "iterative.reward_model", "iterative.cost_model", "iterative.helpful_policy", "iterative.safe_policy",
    "evaluation.model", "evaluation.base",
]  # fmt: skip


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in PATHS:
        section, _, key = name.rpartition(".")
        tree = f"{section}: {{{key}: ~/x}}" if section else f"{key}: ~/x"
        for settings in (load_settings(None, [f"{name}=~/x"]), load_settings(write(tmp_path, tree))):
            value = functools.reduce(getattr, name.split("."), settings)
            assert value == "/home/me/x", name
    assert load_settings(None, ["data.path=./~/x", "model.path=a~b"]).data.path == "./~/x"
    with pytest.raises(SettingsError, match="no user of that name"):
        load_settings(None, ["output_dir=~nobody-of-this-name/x"])


def test_no_setting_that_names_a_folder_is_forgotten() -> None:
    folders = [
        name
        for name, info in walk(Settings)
        if re.search(r"\b(Folder|folder|file|hub id|model that|Model that)\b", info.description or "")
    ]
    assert set(folders) <= {*PATHS, "engine.url"}, set(folders) - set(PATHS)


def test_an_unknown_key_is_looked_for_in_the_section_of_the_command() -> None:
    for section in ("sft", "reward", "guard"):
        with pytest.raises(SettingsError, match=f"did you mean '{section}.max_steps'"):
            load_settings(None, ["max_steps=2"], section=section)
    with pytest.raises(SettingsError, match=r"write it below its section"):
        validate_tree({"reward.max_steps": 3})


def validate_tree(tree: dict[str, object]) -> None:
    config_io.validate(Settings, tree, "run.yaml")


def test_long_values_are_cut() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(
            None, ["reward.max_steps=" + "x" * 5000, "y" * 5000 + "=1", "sft.lr_scheduler_type=" + "z" * 5000]
        )
    assert max(len(line) for line in str(caught.value).splitlines()) < 400
