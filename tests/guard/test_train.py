"""Training end to end on a tiny LLaVA: it learns from pictures, resumes, calibrates, and says what it cannot judge."""

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sections import of, recorded

from beavertails_v import load_responses
from beavertails_v.schema import LabelledResponse, Prompt, Response, Severity
from beavertails_v.taxonomy import Taxonomy
from guard import losses
from guard.classifier import Guard, UntrainedKindError
from guard.evaluate import evaluate, grey_image
from guard.examples import examples_of, held_out, labels_of, lesson_labels, lessons_of
from guard.golden import self_test
from guard.train import GuardOptions, GuardTrainer, train_guard
from safe_rlhf_v.config import Settings
from safe_rlhf_v.statistics import Resampling
from safe_rlhf_v.training.encode import DataError
from tests.beavertails_v.data_files import official_row, write_parquet
from tests.guard.conftest import GREEN, RED, picture, rows

NO_CALIBRATION = GuardOptions(calibration_share=0, head_learning_rate=3e-2)


def settings(**changes: Any) -> Settings:
    made = Settings(seed=3)
    section = dict(use_lora=False, learning_rate=1e-2, max_steps=60, per_device_train_batch_size=24, save_steps=1000)
    for name, value in (section | dict(lr_scheduler_type="constant") | changes).items():
        setattr(made.guard, name, value)
    return made


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("guard")
    intervals = Resampling(draws=100, seed=3)
    arguments: Any = (rows(), rows(), base, folder, *of(settings(), "guard"))
    measured = train_guard(*arguments, options=NO_CALIBRATION, resampling=intervals)
    recorded(settings(), "guard", folder, base, measured)
    return folder, measured


def test_overfits_what_only_the_picture_tells(trained: tuple[Path, dict[str, Any]]) -> None:
    _, measured = trained
    report = measured["evaluation"]
    assert measured["examples"] == 8 + 16 and measured["kinds"] == ["query", "response"]
    assert report["query"]["f1"] == 1 and report["response"]["f1"] == 1
    assert report["severity"]["accuracy"] == 1 and report["severity_kappa"] == 1
    supported = {k: v for k, v in report["categories"].items() if v["support"]}
    assert len(supported) == 2 and all(v["f1"] == 1 for v in supported.values())
    # every harmless query has a harmful twin of the same words, and none is refused
    assert report["over_refusal"] == 0 and report["over_refusal_n"] == 4
    # with grey pictures the four twins cannot be told apart: at best all are flagged, 2 * 4 / (2 * 4 + 4)
    assert report["blind_kind"] == "query" and report["blind_f1"] <= 2 / 3 + 1e-9
    json.dumps(report, allow_nan=False)


def test_grey_picture_keeps_the_size_alone() -> None:
    image = grey_image(picture(RED, 48)).load()
    assert image.size == (48, 48) and image.getcolors() == [(48 * 48, (128, 128, 128))]


def test_a_trained_guard_passes_the_test_that_a_server_asks_for(trained: tuple[Path, dict[str, Any]]) -> None:
    assert self_test(Guard.from_pretrained(trained[0]), trained[0]) >= 2


def test_folder_holds_everything(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, measured = trained
    guard = Guard.from_pretrained(folder, batch_size=8)  # as it was measured with
    again = evaluate(guard, rows(), samples=100, seed=3)
    assert again == measured["evaluation"]
    assert json.loads((folder / "metrics.json").read_text()) == measured
    for name in (
        "guard.json",
        "calibration.json",
        "policy.yaml",
        "settings.yaml",
        "README.md",
        "left_out.jsonl",
        "metrics.jsonl",
    ):
        assert (folder / name).is_file(), name
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "unsafe_loss", "severity_loss", "category_loss"} <= set(logged[0])
    assert logged[-2]["unsafe_loss"] < 0.1 < logged[0]["unsafe_loss"]


def test_resume_gives_the_same_weights(base: Path, tmp_path: Path) -> None:
    straight = settings(
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        save_total_limit=5,
        per_device_train_batch_size=8,
        lr_scheduler_type="linear",
    )
    train_guard(rows(), [], base, tmp_path / "a", *of(straight, "guard"), options=NO_CALIBRATION)
    whole = {n: p.clone() for n, p in Guard.from_pretrained(tmp_path / "a").model.named_parameters()}
    # the same run, killed after its checkpoint of step 3
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "checkpoint-3").rename(tmp_path / "b" / "checkpoint-3")
    train_guard(rows(), [], base, tmp_path / "b", *of(straight, "guard"), options=NO_CALIBRATION)
    resumed = dict(Guard.from_pretrained(tmp_path / "b").model.named_parameters())
    assert all(torch.equal(p, resumed[n]) for n, p in whole.items())
    steps = [json.loads(line)["step"] for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) > 3
    # a finished run that is started again trains no further
    again = train_guard(rows(), [], base, tmp_path / "a", *of(straight, "guard"), options=NO_CALIBRATION)
    finished = dict(Guard.from_pretrained(tmp_path / "a").model.named_parameters())
    assert again["steps"] == 6 and all(torch.equal(p, finished[n]) for n, p in whole.items())


def test_without_harmless_queries_only_responses_are_learned(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harmful = [row for row in rows() if row.prompt.category]
    with caplog.at_level(logging.WARNING, "guard.train"):
        one = of(settings(max_steps=1), "guard")
        measured = train_guard(harmful, harmful, base, tmp_path, *one, options=NO_CALIBRATION)
    assert "4 unsafe and 0 safe query examples" in caplog.text and "benign prompts" in caplog.text
    assert measured["kinds"] == ["response"] and measured["examples"] == 8
    assert measured["evaluation"]["query"] is None and measured["evaluation"]["blind_kind"] == "response"
    guard = Guard.from_pretrained(tmp_path)
    with pytest.raises(UntrainedKindError):
        guard.moderate(None, "hi")
    assert guard.moderate(None, "hi", "hello").kind == "response"


def test_a_benign_set_teaches_queries(base: Path, tmp_path: Path) -> None:
    harmful = [row for row in rows() if row.prompt.category]
    benign = [row.prompt for row in rows() if not row.prompt.category]
    measured = train_guard(
        harmful,
        harmful,
        base,
        tmp_path,
        *of(settings(max_steps=1), "guard"),
        benign=benign,
        benign_evaluation=benign,
        options=NO_CALIBRATION,
    )
    assert measured["kinds"] == ["query", "response"] and measured["examples"] == 8 + 8
    assert measured["evaluation"]["query"]["n"] == 8 and measured["evaluation"]["over_refusal_n"] == 4
    with pytest.raises(ValueError, match="benign prompt .* has category 'animal_abuse'"):
        train_guard(harmful, [], base, tmp_path, *of(settings(), "guard"), benign=[harmful[0].prompt])


def test_queries_of_unknown_harm_are_neither_taught_nor_graded(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt without a category, as all of PKU-SafeRLHF, is no harmless query; a benign set still makes it one."""
    unlabelled = [replace(r, prompt=replace(r.prompt, benign=False)) if r.prompt.benign else r for r in rows()]
    found = examples_of(unlabelled)
    assert len(found["query"]) == 4 and all(e.unsafe for e in found["query"]) and len(found["response"]) == 16
    told = examples_of(unlabelled, [r.prompt for r in rows() if r.prompt.benign])
    assert len(told["query"]) == 8 and sum(e.unsafe for e in told["query"]) == 4
    with caplog.at_level(logging.WARNING, "guard.train"):
        one = of(settings(max_steps=1), "guard")
        measured = train_guard(unlabelled, unlabelled, base, tmp_path, *one, options=NO_CALIBRATION)
    assert measured["kinds"] == ["response"] and measured["unknown_queries"] == 4
    assert measured["evaluation"]["unknown_queries"] == 4
    assert "4 of 8 queries are labelled neither harmful nor harmless" in caplog.text


def test_data_that_teaches_nothing_is_an_error(base: Path, tmp_path: Path) -> None:
    unsafe = [row for row in rows() if row.prompt.category and not row.response.safe]
    with pytest.raises(DataError, match="neither queries nor responses"):
        train_guard(unsafe, [], base, tmp_path, *of(settings(), "guard"))


def test_too_long_rows_are_left_out_by_name(base: Path, tmp_path: Path) -> None:
    data = rows()
    data.append(LabelledResponse(prompt=data[0].prompt, response=Response(text="a long answer " * 40, safe=True)))
    limited = settings(max_steps=1)
    limited.model.max_response_length = 64
    measured = train_guard(data, [], base, tmp_path, *of(limited, "guard"), options=NO_CALIBRATION)
    assert measured["left_out"] == 1 and measured["examples"] == 24
    (line,) = (tmp_path / "left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "ResponseTooLong"


def test_what_is_left_out_stands_by_file_row_and_split(base: Path, tmp_path: Path) -> None:
    """Of the data and of the benign set, of both splits: what loading left out as what the model cannot read."""
    long = "what is this ? " * 60
    lines = [official_row(i) for i in range(8)]
    lines[2]["response_1"], lines[4]["is_response_1_safe"] = "a long answer " * 60, "perhaps"
    for split in ("train", "evaluation"):
        write_parquet(tmp_path / "data" / f"{split}.parquet", lines)
        kind = [official_row(10, category="benign"), official_row(11, category="benign", question=long)]
        write_parquet(tmp_path / "benign" / f"{split}.parquet", kind)
    train, evaluation = (load_responses(tmp_path / "data", x) for x in ("train", "evaluation"))
    benign = load_responses(tmp_path / "benign", "train")
    limited = settings(max_steps=1)
    limited.model.max_response_length = limited.model.max_prompt_length = 64
    measured = train_guard(
        train, evaluation, base, tmp_path / "run", *of(limited, "guard"), options=NO_CALIBRATION, benign=benign,
        benign_evaluation=load_responses(tmp_path / "benign", "evaluation"),
    )  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "run" / "left_out.jsonl").read_text().splitlines()]
    places = [(Path(x["file"]).parent.name, x["split"], x["row"], x["reason"]) for x in found]
    assert places == [
        ("data", "train", 5, "invalid"),
        ("benign", "train", 2, "PromptTooLong"),
        ("data", "train", 3, "ResponseTooLong"),
        ("data", "evaluation", 5, "invalid"),
    ]
    assert (measured["left_out"], measured["evaluation_left_out"]) == (3, 1)


def test_placeholder_in_a_question_trains_as_text(base: Path, tmp_path: Path) -> None:
    data = [replace(r, prompt=replace(r.prompt, text=r.prompt.text + " <image>")) for r in rows()]
    measured = train_guard(data, [], base, tmp_path, *of(settings(max_steps=1), "guard"), options=NO_CALIBRATION)
    assert measured["left_out"] == 0 and measured["steps"] == 1


def test_calibration_rows_are_whole_prompts_and_not_trained_on(base: Path, tmp_path: Path) -> None:
    examples = [e for some in examples_of(rows()).values() for e in some]
    rest, out = held_out(examples, 0.5)
    assert len(rest) + len(out) == len(examples) and rest and out
    assert not {e.prompt.id for e in rest} & {e.prompt.id for e in out}
    options = GuardOptions(calibration_share=0.5)
    measured = train_guard(rows(), [], base, tmp_path, *of(settings(max_steps=1), "guard"), options=options)
    assert measured["examples"] == len(rest)
    fitted = measured["calibration_fit"]
    assert fitted["query"]["n"] + fitted["response"]["n"] == len(out)
    assert Guard.from_pretrained(tmp_path).calibration.id != "none"


def test_frozen_tower_encodes_each_picture_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlavaModel as Llava

    calls, original = [], Llava.get_image_features

    @functools.wraps(original)
    def counted(self: Llava, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Llava, "get_image_features", counted)
    train_guard(rows(), [], base, tmp_path, *of(settings(max_steps=6), "guard"), options=NO_CALIBRATION)
    assert len(calls) == 2  # one red and one green picture, in six steps over 24 rows


def test_lora_trains_adapter_and_heads_alone(base: Path, tmp_path: Path) -> None:
    before = dict(Guard.from_pretrained(_saved(base, tmp_path / "zero", 0)).model.named_parameters())
    after = dict(Guard.from_pretrained(_saved(base, tmp_path / "three", 3)).model.named_parameters())
    changed = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert changed and all(n.startswith("heads.") or ".lora_" in n for n in changed)
    assert any(".lora_B" in n for n in changed) and (tmp_path / "three" / "adapter_model.safetensors").is_file()


def _saved(base: Path, folder: Path, steps: int) -> Path:
    rate = 1e-30 if steps == 0 else 1e-2
    options = replace(NO_CALIBRATION, head_learning_rate=rate)
    made = settings(use_lora=True, max_steps=max(1, steps), learning_rate=rate)
    train_guard(rows(), [], base, folder, *of(made, "guard"), options=options)
    return folder


def test_labels_of_every_kind_of_knowledge() -> None:
    names = Taxonomy.load().secondary
    known = Prompt(text="a", category="animal_abuse", severity=Severity.SEVERE)
    data = [
        LabelledResponse(prompt=known, response=Response(text="x", safe=False, harmless_rate=-2)),
        LabelledResponse(prompt=known, response=Response(text="y", safe=False)),
        LabelledResponse(prompt=known, response=Response(text="z", safe=True)),
        LabelledResponse(prompt=Prompt(text="b", benign=True), response=Response(text="u", safe=False)),
    ]
    examples = examples_of(data)
    assert [(e.unsafe, e.severity) for e in examples["query"]] == [(True, 3), (False, 0)]
    labels = labels_of(examples["response"], names)
    assert labels.unsafe.tolist() == [1, 1, 0, 1] and labels.severity.tolist() == [2, -1, 0, -1]
    own = names.index("animal_abuse")
    assert labels.categories[:2, own].tolist() == [1, 1] and labels.categories[:2].sum() == 2
    assert labels.categories[2].abs().sum() == 0 and (labels.categories[3] == -1).all()
    with pytest.raises(ValueError, match="'jaywalking' is not in the taxonomy"):
        labels_of([replace(examples["query"][0], category="jaywalking")], names)


def test_one_forward_gives_what_query_and_response_alone_give(guard: Guard) -> None:
    """Rows of unlike lengths, one of them without a response."""
    texts = [
        ("what is it?", RED, "I cannot help"),
        ("hi", GREEN, None),
        ("tell me about the key", GREEN, "first take it"),
    ]
    found = [guard.row(Prompt(text=t, images=(picture(c),)), r) for t, c, r in texts]
    inputs, replies = guard.batch(found)
    assert replies is not None and replies.mask.sum(1).tolist()[1] == 0
    with torch.no_grad():
        both = guard.model(inputs, replies, both=True)
    alone = guard.logits([guard.row(Prompt(text=t, images=(picture(c),)), None) for t, c, _ in texts] + found)
    assert all(torch.allclose(both[name], alone[name], atol=2e-6) for name in alone)
    assert not torch.allclose(both["unsafe"][0], both["unsafe"][3], atol=1e-3)


def test_lessons_pair_each_response_with_its_query() -> None:
    examples = examples_of(rows())
    names = Taxonomy.load().secondary
    lessons = lessons_of(examples["query"], examples["response"][:3])
    # three responses with their queries (two prompts), then the six queries that none of the three answers
    assert [x.query is not None and x.response is not None for x in lessons] == [True] * 3 + [False] * 6
    assert all(x.query.prompt.id == x.response.prompt.id for x in lessons[:3])
    labels = lesson_labels(lessons, names)
    assert labels.is_response.tolist() == [False] * 9 + [True] * 9
    assert labels.unsafe.tolist() == [1, 1, 0] + [1, 0] * 3 + [1, 0, 0] + [-1] * 6
    assert (labels.categories[12:] == -1).all() and (labels.severity[12:] == -1).all()
    only = lesson_labels(lessons_of([], examples["response"]), names)
    assert (only.unsafe[:16] == -1).all() and (only.unsafe[16:] >= 0).all()


def test_heads_have_their_own_learning_rate(base: Path, tmp_path: Path) -> None:
    rates = {}

    class Spy(GuardTrainer):
        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            made = super().create_optimizer(model)
            rates.update({len(group["params"]): group["lr"] for group in made.param_groups})
            return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guard.train.GuardTrainer", Spy)
        train_guard(rows(), [], base, tmp_path, *of(settings(max_steps=1), "guard"), options=NO_CALIBRATION)
    assert rates[6] == 3e-2 and sorted(rates.values()) == [1e-2, 3e-2]  # three weights and three biases
    assert losses.LEVELS == 4
