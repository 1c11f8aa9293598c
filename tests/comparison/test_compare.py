"""The comparison's settings, plan and command."""

import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from beavertails_v.picture_world import vocabulary, write
from safe_rlhf_v.cli import app
from safe_rlhf_v.comparison.base import base_of
from safe_rlhf_v.comparison.compare import _mean_cost
from safe_rlhf_v.comparison.measure import effort
from safe_rlhf_v.comparison.plan import plan_runs
from safe_rlhf_v.comparison.planned import PlannedRun, infeasible, measured, run_job, write_run
from safe_rlhf_v.comparison.settings import CompareSettings, flat_overrides, load_compare, merge
from safe_rlhf_v.config import SettingsError, load_settings
from safe_rlhf_v.demo.tiny import tiny_llava
from safe_rlhf_v.stages.folder import write_json
from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import load_processor

CONFIG = Path(__file__).parents[2] / "configs" / "compare.yaml"
ALL_METHODS = CONFIG.with_name("compare_all.yaml")  # adds to it, in the same folder
BOUNDED = {"bound": "policy.threshold", "bound_is": "cost"}


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "base": {"data": {"path": "d"}, "model": {"path": "m", "start": "s"}, "policy": {"reward_model": "r"}},
        "seeds": [0, 1],
        "methods": {
            "lag": {"title": "Lagrangian", **BOUNDED},
            "repo": {"set": {"policy.algorithm": "repo", "policy.dual.kind": "additive"}},
        },
        "quick": {"seeds": [7], "methods": ["lag"]},
        "claims": [{"paper": "p", "text": "t", "method": "repo", "against": "lag", "expect": "lower"}],
    }
    return merge(whole, changes)


def settings(folder: Path, quick: bool = False, overrides: tuple[str, ...] = (), **changes: Any) -> CompareSettings:
    (folder / "compare.yaml").write_text(yaml.safe_dump(tree(folder, **changes)))
    return load_compare(folder / "compare.yaml", overrides, quick=quick)


def plan(compare: CompareSettings, reference_cost: float = 1.0) -> list[PlannedRun]:
    return plan_runs(compare, base_of(compare), reference_cost)


def test_runs_share_the_base_and_differ_in_what_they_name(tmp_path: Path) -> None:
    runs = plan(settings(tmp_path, bound=4.0, budget=640))
    assert [run.name for run in runs] == ["lag seed 0", "repo seed 0", "lag seed 1", "repo seed 1"]
    first, second = runs[0].settings, runs[1].settings
    assert (first.policy.threshold, runs[0].bound) == (-3.0, 4.0)  # 4 below the start model's 1
    assert (second.policy.algorithm, second.policy.dual.kind, runs[1].bound) == ("repo", "additive", None)
    assert first.policy.threshold_quantile is None  # the demo's goes with its threshold, auto
    assert first.policy.max_steps == second.policy.max_steps == 10  # 640 responses at 64 prompts a rollout
    assert {run.settings.model.start for run in runs} == {"s"}
    assert {run.settings.policy.reward_model for run in runs} == {"r"}
    assert {run.settings.policy.cost_model for run in runs} == {str(tmp_path / "out/base/cost")}
    assert [run.settings.seed for run in runs] == [0, 0, 1, 1]
    assert base_of(settings(tmp_path)).stages == ["cost"]


def test_a_sweep_adds_bounds_and_takes_the_main_one_from_the_runs(tmp_path: Path) -> None:
    sweep = {"methods": ["lag"], "bounds": [2, 4, 6], "seeds": [1]}
    runs = [run for run in plan(settings(tmp_path, bound=4, sweep=sweep)) if run.swept]
    assert [(run.name, run.bound) for run in runs] == [("lag at 2 seed 1", 2), ("lag at 6 seed 1", 6)]
    assert [run.settings.policy.threshold for run in runs] == [-1, -5]
    assert runs[0].folder == tmp_path / "out/runs/lag/bound2/seed1"


def test_a_method_reads_the_model_of_another(tmp_path: Path) -> None:
    runs = plan(settings(tmp_path, methods={"after": {"set": {"model.start": "{lag}"}}}))
    after = next(run for run in runs if run.name == "after seed 1")
    assert after.settings.model.start == str(tmp_path / "out/runs/lag/seed1/policy")
    assert run_job(after).after == ("lag seed 1",)
    with pytest.raises(SettingsError, match="names {lag}, which has no run with seed 5"):
        plan(
            settings(
                tmp_path,
                methods={"after": {"set": {"model.start": "{lag}"}, **BOUNDED}},
                sweep={"methods": ["after"], "bounds": [1], "seeds": [5]},
            )
        )


def test_quick_replaces_and_leaves_out(tmp_path: Path) -> None:
    quick = settings(tmp_path, quick=True, overrides=("budget=64",))
    assert (quick.seeds, list(quick.methods), quick.claims, quick.budget) == ([7], ["lag"], [], 64)
    assert flat_overrides({"a": {"b": 3e-5, "c": [1, "x"]}, "d.e": "log"}) == ["a.b=3.0e-05", "a.c=[1, x]", "d.e=log"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methds": {}}, "unknown key 'methds'; did you mean 'methods'"),
        ({"methods": {"lag": {"stage": "polcy"}}}, "no command `safe-rlhf-v train polcy`"),
        ({"methods": {"lag": {"set": {"policy.algoritm": "x"}}}}, "methods.lag: override 'policy.algoritm=x'"),
        ({"methods": {"base": {}}}, "'base' names the model that all start from"),
        ({"base": {"policy": {"betaa": 1}}}, "did you mean 'policy.beta'"),
        ({"sweep": {"methods": ["repo"], "bounds": [1]}}, "repo has no `bound`"),
        ({"sweep": {"methods": ["lg"], "bounds": [1]}}, "sweep.methods: no method 'lg'"),
        ({"claims": [{"paper": "", "text": "", "method": "x", "expect": "lower"}]}, "claims[0]: no method 'x'"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"budget": 3}, "one rollout is 64 responses"),
        ({"settings": "none.yaml"}, "none.yaml: no such settings file"),
        ({"methods": {"lag": {"set": {"model.start": "{reop}"}}}}, "names {reop}, and there is no such method"),
        (
            {"methods": {"lag": {"set": {"model.start": "{repo}"}}, "repo": {"set": {"model.start": "{lag}"}}}},
            "lag needs repo needs lag",
        ),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as error:
        plan(settings(tmp_path, **changes))
    assert words in str(error.value)


def test_a_run_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    def first(*overrides: str) -> PlannedRun:
        return plan(settings(tmp_path, overrides=overrides))[0]

    run = first()
    write_run(run)
    write_json(
        run.folder / "measured.json", {"identity": json.loads((run.folder / "plan.json").read_text())["identity"]}
    )
    assert measured(run.folder)
    write_run(first("base.policy.save_steps=3"))  # bookkeeping
    assert measured(run.folder)
    write_run(first("base.evaluation.samples=9"))  # measured again, not trained again
    assert not measured(run.folder)
    with pytest.raises(SettingsError, match=r"other settings \(policy.beta\)"):
        write_run(first("base.policy.beta=9"))


def test_an_infeasible_bound_is_a_result(tmp_path: Path) -> None:
    assert not infeasible(tmp_path)
    write_json(tmp_path / "iterations.json", {"one_shot": {"verdict": "infeasible"}})
    assert infeasible(tmp_path)


def test_own_settings_name_model_and_data(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("model: {path: m}")
    with pytest.raises(SettingsError, match=r"own.yaml: data.path is not set"):
        base_of(settings(tmp_path, settings=str(tmp_path / "own.yaml"), base={"data": {"path": ""}}))


@pytest.mark.parametrize(("config", "quick"), [(CONFIG, False), (CONFIG, True), (ALL_METHODS, False)])
def test_the_shipped_comparisons_can_be_planned(tmp_path: Path, config: Path, quick: bool) -> None:
    compare = load_compare(config, [f"output_dir={tmp_path}"], quick=quick)
    runs = plan(compare)
    assert len(compare.seeds) >= 3
    shared = load_compare(CONFIG, [f"output_dir={tmp_path}"])
    assert quick or all(compare.methods[name] == method for name, method in shared.methods.items())
    assert len({run.folder for run in runs}) == len(runs) > len(compare.methods)


def test_a_file_stands_on_others_and_each_error_says_what_is_wrong(tmp_path: Path) -> None:
    write = lambda name, tree: (tmp_path / name).write_text(yaml.safe_dump(tree))  # noqa: E731
    write("low.yaml", yaml.safe_load(CONFIG.read_text()))
    write("middle.yaml", {"extends": "low.yaml", "seeds": [7]})
    write("top.yaml", {"extends": "middle.yaml", "output_dir": "elsewhere"})
    top, low = load_compare(tmp_path / "top.yaml"), load_compare(tmp_path / "low.yaml")
    assert (top.seeds, str(top.output_dir)) == ([7], "elsewhere") and top.methods == low.methods
    for wrong in ("", ["low.yaml"], "no.yaml"):
        write("wrong.yaml", {"extends": wrong})
        with pytest.raises(SettingsError, match=r"wrong.yaml: extends = .*name a settings file that lies beside"):
            load_compare(tmp_path / "wrong.yaml")
    write("low.yaml", {"extends": "top.yaml"})
    with pytest.raises(SettingsError, match=r"low.yaml: extends = 'top.yaml': that one extends this one"):
        load_compare(tmp_path / "top.yaml")


class Forked:
    """In place of subprocess.Popen for `python -m module argument`: a copy of this process, which has torch loaded."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], **_: Any) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(command[2:], stdout.fileno()))

    @staticmethod
    def _run(arguments: list[str], output: int) -> int:
        torch.set_num_threads(1)  # threads do not survive a fork
        sys.argv, sys.stdout = arguments, open(output, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = sys.stdout
        try:
            runpy.run_module(arguments[0], run_name="__main__")
        except SystemExit as stopped:
            return int(stopped.code or 0)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def poll(self) -> int | None:
        ended, status = (0, 0) if self.code is not None else os.waitpid(self.pid, os.WNOHANG)
        self.code = os.waitstatus_to_exitcode(status) if ended else self.code
        return self.code


def test_from_settings_to_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base models given, one method, one seed, and one that fails. The start model is measured by a real process."""
    real = subprocess.Popen
    monkeypatch.setattr(
        "safe_rlhf_v.jobs.scheduler.subprocess.Popen",
        lambda command, **how: (real if command[-1].endswith("base/reference") else Forked)(command, **how),
    )
    write(tmp_path / "data", train=8, evaluation=8)
    model, processor = tiny_llava(vocabulary(), hidden_size=16, layers=2, vision_layers=1, heads=2)
    model.save_pretrained(tmp_path / "start")
    processor.save_pretrained(tmp_path / "start")
    for name in ("reward", "cost"):
        headed = HeadedModel(load_backbone(tmp_path / "start"), {"score": 1})
        headed.save_pretrained(tmp_path / name, load_processor(tmp_path / "start"))
    base = {
        "data": {"path": str(tmp_path / "data")},
        "model": {"path": str(tmp_path / "start"), "start": str(tmp_path / "start")},
        "policy": {f"{k}_model": str(tmp_path / k) for k in ("reward", "cost")}
        | {"per_device_train_batch_size": 2, "max_new_tokens": 4, "guidance_rollouts": 0},
        "generation": {"max_new_tokens": 4},
    }
    methods = {"lag": BOUNDED, "repo": {"set": {"model.max_prompt_length": 1, "policy.algorithm": "repo"}}}
    methods["after"] = {"set": {"policy.reward_model": "{repo}"}}
    whole = tree(tmp_path) | {"base": base, "methods": methods, "seeds": [0], "budget": 4, "bound": 1, "claims": []}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(whole))
    command = ["compare", "--config", str(tmp_path / "compare.yaml")]
    listed = CliRunner().invoke(app, [*command, "--plan"], catch_exceptions=False)
    assert "3 runs, 0 of them done" in listed.output and not (tmp_path / "out").exists()

    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 1, result.output
    assert "failed  repo seed 0" in result.output and "no prompt is left" in " ".join(result.output.split())
    assert "not run  after seed 0: needs repo seed 0" in result.output
    rows = pq.read_table(tmp_path / "out/results.parquet").to_pylist()
    assert [(r["method"], r["responses_sampled"], r["training_steps"]) for r in rows] == [("base", 0, 0), ("lag", 4, 2)]
    assert rows[1]["mean_cost"] is not None
    page = (tmp_path / "out/compare.html").read_text()
    assert "repo seed 0: exit code" in page and "after seed 0: needs repo seed 0" in page
    listed = CliRunner().invoke(app, [*command, "--plan"], catch_exceptions=False)
    assert "done in" in listed.output and "to do" in listed.output and "3 runs, 1 of them done" in listed.output


def test_bounds_are_counted_from_the_first_measurement(tmp_path: Path) -> None:
    """Measured again, with other answers, the start model costs 9: the bounds stay, or all would be trained again."""
    for cost in (1.0, 9.0):
        pq.write_table(pa.table({"cost": [cost - 1, cost + 1]}), tmp_path / "answers.parquet")
        assert _mean_cost(tmp_path) == 1.0


def effort_of(tmp_path: Path, stage: str, measured: dict[str, Any], *overrides: str) -> dict[str, Any]:
    write_json(tmp_path / stage / "done.json", {"seconds": 7.0, "measured": measured})
    return effort(getattr(load_settings(None, overrides), stage), tmp_path, stage)


def test_what_a_run_took(tmp_path: Path) -> None:
    """SACPO trains twice; C-DPO draws 8 answers each 20 of 45 steps; 5 steps of 4 pairs where steps were asked for."""
    part = {"steps": 45, "train_rows": 60}
    direct = "direct.num_train_epochs=3"
    assert effort_of(tmp_path, "direct", {"q": 1.0, "helpfulness": part, "safety": part}, direct) == {
        "seconds": 7.0, "steps": 90, "pairs": 360,
    }  # fmt: skip
    drawn = effort_of(tmp_path, "direct", part, direct, "direct.algorithm=c_dpo", "direct.c_dpo.dual_prompts=8")
    assert drawn == {"seconds": 7.0, "steps": 45, "pairs": 180, "sampled": 16}
    assert effort_of(tmp_path, "direct", part | {"steps": 5}, "direct.max_steps=5")["pairs"] == 20
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "metrics.jsonl").write_text('{"step": 1, "seconds": 2.5}\n{"step": 2, "seconds": 1.0}\n')
    assert effort_of(tmp_path, "policy", {"steps": 2}, "policy.num_generations=3") == {
        "seconds": 3.5, "steps": 2, "sampled": 24,
    }  # fmt: skip
    rows = ["iterative.prompts=5", "iterative.samples=6", "iterative.pair_prompts=7"]
    found = effort_of(tmp_path, "iterative", {"iterations": 2, "prompts": 50}, *rows)
    assert found == {"seconds": 7.0, "steps": 2, "sampled": 5 * 6 * 3 + 7 * 2}


IMITATION: dict[str, Any] = {
    "methods": {"alone": {"set": {"policy.algorithm": "imitation"}}, "pairs": {"stage": "direct"}}
}


def test_all_arms_imitate_alike_or_none_does(tmp_path: Path) -> None:
    """The demo's settings imitate with 1.2; here the comparison says, for on-policy and direct methods alike."""
    for arms, shared in (("none", 0.0), ("all", 0.7)):
        changes = {**IMITATION, "imitation": {"arms": arms, "coefficient": 0.7}}
        runs = {run.method: run.settings for run in plan(settings(tmp_path, **changes))}
        assert [runs[name].policy.ptx_coeff for name in ("lag", "repo", "alone")] == [shared, shared, 0.7]
        assert runs["pairs"].direct.ptx_coeff == shared
        assert {runs["lag"].policy.demonstrations, runs["pairs"].direct.demonstrations} == {"both"}


def test_a_claim_is_held_against_the_control(tmp_path: Path) -> None:
    claim = {"paper": "p", "text": "t", "method": "lag", "against": "control", "expect": "lower"}
    for arms, control in (("none", "base"), ("all", "alone")):
        found = settings(tmp_path, **IMITATION, claims=[claim], imitation={"arms": arms})
        assert (found.control, found.claims[0].against) == (control, control)
    assert settings(tmp_path, quick=True, claims=[claim]).claims[0].against == "base"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"imitation": {"arms": "all"}, "claims": [{"against": "base"}]}, "lag imitates demonstrations and base does"),
        ({"claims": [{"against": "alone"}]}, "alone imitates demonstrations and lag does not"),
        ({"methods": {"lag": {"set": {"policy.ptx_coeff": 2}}}}, "lag.set: policy.ptx_coeff is set by `imitation`"),
        ({"base": {"direct": {"ptx_coeff": 2}}}, "base: direct.ptx_coeff is set by `imitation`"),
        ({"methods": {"control": {}}}, "'control' names what methods are held against"),
    ],
)
def test_what_is_not_controlled_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    claims = [{"paper": "", "text": "", "method": "lag", "expect": "lower", **c} for c in changes.get("claims", [])]
    with pytest.raises(SettingsError) as error:
        settings(tmp_path, **merge(IMITATION, {**changes, "claims": claims}))
    assert words in str(error.value)


def test_an_imitation_only_arm_is_asked_for_where_all_imitate(tmp_path: Path) -> None:
    claim = {"paper": "", "text": "", "method": "lag", "against": "control", "expect": "lower"}
    with pytest.raises(SettingsError, match="needs an arm that imitates alone"):
        settings(tmp_path, imitation={"arms": "all"}, claims=[claim])


def test_a_claim_about_imitation_alone_is_no_confusion(tmp_path: Path) -> None:
    claim = {"paper": "", "text": "", "method": "alone", "against": "base", "expect": "lower"}
    assert settings(tmp_path, **IMITATION, claims=[claim]).claims[0].against == "base"
