"""A stage's folder knows its data, its base and its neighbour; what is damaged in it is named."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safe_rlhf_v.config import Settings, SettingsError, load_settings
from safe_rlhf_v.stages import fingerprint
from safe_rlhf_v.stages.folder import is_full_disk, run_stage

OWN = """name: own
kind: comparisons
columns: {question: question, images: photo, response: [a, b], safe: [c, d], more_helpful: e, safer: f}
ids: [first, second]
"""
ROW = {"question": "q", "image": "a.png", "response_1": "one", "response_2": "two", "more_helpful_response_id": 1}


def settings(folder: Path, *more: str) -> Settings:
    return load_settings(None, [f"output_dir={folder / 'run'}", f"data.path={folder / 'data'}", *more])


def write(folder: Path, **changes: Any) -> None:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "a.png").write_bytes(b"picture")
    for split in ("train", "evaluation"):
        (folder / "data" / f"{split}.jsonl").write_text(json.dumps(ROW | changes) + "\n")


def measured(_: Path) -> dict[str, Any]:
    return {"x": 1}


def never(_: Path) -> dict[str, Any]:
    raise AssertionError("it is done")


def killed(folder: Path) -> dict[str, Any]:
    (folder / "checkpoint-1").mkdir()
    raise KeyboardInterrupt


@pytest.mark.parametrize("first", [measured, killed])
def test_changed_data_is_noticed(tmp_path: Path, first: Any) -> None:
    write(tmp_path)
    if first is killed:
        with pytest.raises(KeyboardInterrupt):
            run_stage("reward", settings(tmp_path), ["reward"], first)
    else:
        run_stage("reward", settings(tmp_path), ["reward"], first)
    write(tmp_path, more_helpful_response_id=2)
    with pytest.raises(
        SettingsError, match=r"the data changed since, .*: evaluation.jsonl, train.jsonl; .*--overwrite"
    ):
        run_stage("reward", settings(tmp_path), ["reward"], never)
    assert run_stage("reward", settings(tmp_path), ["reward"], measured, overwrite=True) == {"x": 1}


def test_a_picture_of_another_size_is_changed_data(tmp_path: Path) -> None:
    write(tmp_path)
    run_stage("reward", settings(tmp_path), ["reward"], measured)
    (tmp_path / "data" / "a.png").write_bytes(b"another picture")
    with pytest.raises(SettingsError, match="the data changed"):
        run_stage("reward", settings(tmp_path), ["reward"], never)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
@pytest.mark.parametrize("column", ["image", "photo"])
def test_another_picture_of_the_same_size_is_changed_data(tmp_path: Path, name: str, column: str) -> None:
    write(tmp_path)
    (tmp_path / "data" / "train.jsonl").unlink()
    line = json.dumps({"question": "q", column: "a.png"}).encode()
    (tmp_path / "data" / name).write_bytes(gzip.compress(line, mtime=0) if name.endswith(".gz") else line)
    (tmp_path / "own.yaml").write_text(OWN.replace("photo", column))
    made = settings(tmp_path, f"data.columns={tmp_path / 'own.yaml'}")
    run_stage("reward", made, ["reward"], measured)
    assert run_stage("reward", made, ["reward"], never) == {"x": 1}
    (tmp_path / "data" / "a.png").write_bytes(b"PICTURE")
    with pytest.raises(SettingsError, match="the data changed"):
        run_stage("reward", made, ["reward"], never)


@pytest.mark.parametrize("key", ["data.columns", "guard.policy"])
def test_a_changed_column_map_or_policy_is_noticed_and_a_moved_one_is_the_same(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    (tmp_path / "own.yaml").write_text(OWN)
    run_stage("guard", settings(tmp_path, f"{key}={tmp_path / 'own.yaml'}"), ["guard"], measured)
    (tmp_path / "sub").mkdir()
    (tmp_path / "own.yaml").rename(tmp_path / "sub" / "own.yaml")
    moved = settings(tmp_path, f"{key}={tmp_path / 'sub' / 'own.yaml'}")
    assert run_stage("guard", moved, ["guard"], never) == {"x": 1}
    (tmp_path / "sub" / "own.yaml").write_text(OWN.replace("[first, second]", "[second, first]"))
    with pytest.raises(SettingsError, match=f"the file '{key}' changed since, .*own.yaml"):
        run_stage("guard", moved, ["guard"], never)


def test_moved_and_relative_folders_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write(here)
    (here / "base").mkdir()
    (here / "base" / "config.json").write_text("{}")
    monkeypatch.chdir(here)
    relative = load_settings(None, ["output_dir=run", "data.path=data"])
    run_stage("reward", relative, ["reward"], measured, start="base")
    monkeypatch.chdir(tmp_path)
    run_stage("reward", settings(here), ["reward"], never, start=here / "base")
    shutil.copytree(here, there)
    shutil.rmtree(here)
    run_stage("reward", settings(there), ["reward"], never, start=there / "base")
    (there / "base" / "config.json").write_text('{"changed": 1}')
    with pytest.raises(SettingsError, match="the model 'start' changed since, .*: config.json"):
        run_stage("reward", settings(there), ["reward"], never, start=there / "base")


def test_one_byte_of_a_large_file_is_changed_data_and_a_copy_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 10)
    monkeypatch.setattr(fingerprint, "BLOCK", 2)
    monkeypatch.setattr(fingerprint, "PIECE", 16)
    write(tmp_path)
    picture, labels = tmp_path / "data" / "a.png", tmp_path / "data" / "train.jsonl"
    picture.write_bytes(b"0" * 5000)
    run_stage("reward", settings(tmp_path), ["reward"], measured)
    for file in (picture, labels):
        os.utime(file, (1, 1))  # as a copy has it
    run_stage("reward", settings(tmp_path), ["reward"], never)
    for file, old, new in ((picture, b"0" * 5000, b"0" * 3000 + b"1" + b"0" * 1999), (labels, b'"one"', b'"uno"')):
        before = file.read_bytes()
        file.write_bytes(before.replace(old, new))
        os.utime(file, (1, 1))
        with pytest.raises(SettingsError, match="the data changed since, .*train.jsonl"):
            run_stage("reward", settings(tmp_path), ["reward"], never)
        file.write_bytes(before)


def test_large_weights_are_told_by_blocks_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 16)
    file = tmp_path / "weights.bin"
    hashes = set()
    for fill in (b"a", b"b"):
        file.write_bytes(fill * 5000)
        hashes.add(fingerprint.weights_hash(file))
    assert len(hashes) == 2


HOLDS = """
import sys, time
from pathlib import Path
from safe_rlhf_v.stages.folder import at_work
with at_work(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_while_one_is_at_work_and_not_after_its_end(tmp_path: Path) -> None:
    write(tmp_path)
    folder = tmp_path / "run" / "reward"
    folder.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for overwrite in (False, True):
            with pytest.raises(SettingsError, match=rf"another run is at work here \(process {other.pid} on "):
                run_stage("reward", settings(tmp_path), ["reward"], never, overwrite=overwrite)
    finally:
        other.kill()
        other.wait()
    assert run_stage("reward", settings(tmp_path), ["reward"], measured) == {"x": 1}


RANKS = """
import os, sys, time
from pathlib import Path
from safe_rlhf_v.config import load_settings
from safe_rlhf_v.jobs.forked import ranks
from safe_rlhf_v.stages.folder import DONE, at_work, run_stage, write_json
import safe_rlhf_v.training.encode  # once, not in each fork
folder, rank = Path(sys.argv[1]), lambda: os.environ["RANK"]
def stage(output, work=lambda _: {"worked": 1}):
    made = load_settings(None, [f"output_dir={folder / output}", f"data.path={folder / 'data'}"])
    return run_stage("reward", made, ["reward"], work)
def says(word, *told):
    (folder / f"{word}{rank()}").write_text(" ".join(map(str, told)))
def alone():
    says("alone", stage("run"))
def beside():
    try:
        stage("held")
    except ValueError as error:
        says("beside", error)
def just_ended():
    if rank() == "1":  # another run ends after the main rank has looked
        time.sleep(0.5)
        write_json(folder / "ended" / "reward" / DONE, {"seconds": 1, "measured": {"other": 1}})
    says("ended", stage("ended"))
(folder / "held" / "reward").mkdir(parents=True)
(folder / "ended" / "reward").mkdir(parents=True)
with at_work(folder / "held" / "reward"):
    ranks(2, beside)
ranks(2, alone)
ranks(2, just_ended)
"""


def test_ranks_of_a_launch_share_its_lock_and_what_it_found(tmp_path: Path) -> None:
    write(tmp_path)
    subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], check=True, timeout=120)
    for rank in (0, 1):
        assert (tmp_path / f"alone{rank}").read_text() == "{'worked': 1}"
        assert "another run is at work here (process " in (tmp_path / f"beside{rank}").read_text()
        assert (tmp_path / f"ended{rank}").read_text() == "{'other': 1}"


@pytest.mark.parametrize(
    ("name", "content"), [("stage.json", ""), ("stage.json", "{"), ("done.json", ""), ("done.json", "3")]
)
def test_damaged_records_are_named(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path)
    run_stage("reward", settings(tmp_path), ["reward"], measured)
    (tmp_path / "run" / "reward" / name).write_text(content)
    with pytest.raises(SettingsError, match=f"{name} is (empty|damaged).*--overwrite"):
        run_stage("reward", settings(tmp_path), ["reward"], never)


def test_a_finished_stage_needs_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    run_stage("reward", settings(tmp_path), ["reward"], measured)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as in a folder that may be read alone
    assert run_stage("reward", settings(tmp_path), ["reward"], never) == {"x": 1}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 57856 vs 57748"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_called_so(tmp_path: Path, error: Exception) -> None:
    def work(folder: Path) -> dict[str, Any]:
        (folder / "checkpoint-4").mkdir()
        (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
        raise RuntimeError("while saving") from error

    write(tmp_path)
    with pytest.raises(OSError, match="no space left on the device; .* it goes on from checkpoint-4") as found:
        run_stage("reward", settings(tmp_path), ["reward"], work)
    assert found.value.filename == str(tmp_path / "run" / "reward")
    assert not is_full_disk(RuntimeError("something else"))
