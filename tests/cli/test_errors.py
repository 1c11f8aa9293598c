"""What a command prints and how it ends, on any console and for any text."""

import ast
import builtins
import json
import os
import pickle
import pty
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pyarrow.parquet
import pytest
import torch
import typer
import yaml
from commands import error, run
from safetensors import SafetensorError
from safetensors.torch import load_file

from guard import PolicyError
from safe_rlhf_v.cli.train import next_command
from safe_rlhf_v.console import plain, show
from safe_rlhf_v.errors import user_errors

ROOT = Path(__file__).parents[2]
NAMES = ["w[bold]x", "exp[/b]", "a:cat:b", "[link=x]", "back\\", "12:30:05", "ä[é]"]


def ends(failure: BaseException) -> int:
    @user_errors
    def command() -> None:
        raise failure

    with pytest.raises(typer.Exit) as stopped:
        command()
    return stopped.value.exit_code


def unicode_error() -> UnicodeDecodeError:
    return UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (unicode_error(), "not UTF-8 text"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "cannot be written as UTF-8"),
        (FloatingPointError("loss is nan at step 3"), "loss is nan at step 3"),
        (yaml.YAMLError("bad\n  indent"), "a file is not YAML: bad indent"),
        (jinja2.TemplateSyntaxError("unexpected '}'", 3), "chat template does not work: unexpected '}'"),
        (SafetensorError("Error while deserializing header: HeaderTooLarge"), "weights is damaged"),
        (pickle.UnpicklingError("invalid load key"), "damaged"),
        (FileNotFoundError(2, "No such file or directory", "a[b].txt"), "a[b].txt: no such file"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_fault_of_a_file_is_one_sentence(failure: Exception, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(failure) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and len(said.strip().splitlines()) == 1


def read_lines(file: Path) -> Any:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_opened(file: Path) -> Any:
    with file.open() as stream:
        return yaml.safe_load(stream)


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("scores.jsonl", b'{"scores": [1, 2]}\n{"sco', read_lines),
        ("card.md", b"caf\xe9", lambda file: file.read_text(encoding="utf-8")),
        ("mine.yaml", b"a: [1", read_opened),
        ("heads.safetensors", b"\xff" * 40, lambda file: load_file(file)),
        ("heads.safetensors", b"\xff" * 40, lambda file: load_file(str(file))),
        ("states.zip", b"PK\x03\x04", lambda file: zipfile.ZipFile(file)),
        ("rows.parquet", b"PAR1 PAR1", lambda file: pyarrow.parquet.read_table(file)),
        ("state.pt", b"not weights", lambda file: torch.load(file, weights_only=True)),
    ],
)
def test_a_fault_that_a_library_finds_names_the_file(
    name: str, content: bytes, read: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.txt").touch()
    (tmp_path / name).write_bytes(content)

    @user_errors
    def command() -> None:
        folder, also = tmp_path, tmp_path / "other.txt"  # what a command holds besides
        read(folder / name)
        assert also

    with pytest.raises(typer.Exit) as stopped:
        command()
    said = capsys.readouterr().err
    assert stopped.value.exit_code == 2 and str(tmp_path / name) in said and "other.txt" not in said
    assert len(said.strip().splitlines()) == 1


def test_a_template_that_fails_names_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    processor = SimpleNamespace(tokenizer=SimpleNamespace(name_or_path="models/mine"))

    @user_errors
    def command() -> None:
        assert processor
        raise jinja2.UndefinedError("'dict object' has no attribute 'x'")

    with pytest.raises(typer.Exit):
        command()
    assert "models/mine: the model's chat template does not work" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [KeyError("x"), IndexError(), ValueError("y"), RuntimeError("z"), AssertionError()])
def test_a_crash_has_an_exit_code_of_its_own(failure: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(failure) == 70
    assert "Traceback" in capsys.readouterr().err


def test_a_verdict_keeps_its_exit_code() -> None:
    assert ends(typer.Exit(1)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_text_is_printed_as_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(f"written: {tmp_path}/{name}" + "x" * 200)
    show(name, {name: name, "rates": {name: 1}})
    said = capsys.readouterr().out
    assert f"{name}{'x' * 200}\n" in said and said.count(name) == 5
    result = run("settings", f"output_dir={tmp_path / name}", "--search", "seed", "--save", tmp_path / f"{name}.yaml")
    assert result.exit_code == 0, result.output
    assert f"written: {tmp_path / name}.yaml" in result.output
    assert f"{name}: " in error("data", "check", name)
    assert f"'{name}'" in error("settings", "--search", name)


def command(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-m", "safe_rlhf_v.cli", *arguments], capture_output=True, env=env, check=False
    )


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
def test_a_console_without_a_letter_shows_its_escape(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "snow☃.yaml"
    found = command("settings", "--search", "seed", "--save", file, PYTHONIOENCODING=encoding)
    assert found.returncode == 0, found.stderr
    assert file.is_file() and rb"snow\u2603.yaml" in found.stdout
    found = command("settings", "-c", tmp_path / "none☃.yaml", PYTHONIOENCODING=encoding)
    assert found.returncode == 2 and rb"none\u2603.yaml: no such settings file" in found.stderr


def test_a_text_that_is_not_utf8_is_refused() -> None:
    for arguments in (("generate", "m", "-p", b"what \xff is"), ("guard", "check", "g", "-p", b"what \xff is")):
        found = command(*arguments)
        assert found.returncode == 2 and b"the prompt is not UTF-8 text" in found.stderr, found.stderr


def test_an_option_given_twice_is_refused() -> None:
    assert "--config: given twice" in error("settings", "--config", "a.yaml", "--config=b.yaml")
    assert "--config: given twice" in error("train", "sft", "-c", "a.yaml", "-cb.yaml")
    assert "given twice" in error("data", "check", "x", "--split", "a", "--split", "b")
    assert "given twice" not in error("data", "check", "x", "--split", "--split")
    assert "given twice" not in error("generate", "x", "-i", "a.png", "-i", "b.png", "-p", "hi")


def test_a_path_option_knows_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("settings", "--search", "seed", "--save=~/full.yaml").exit_code == 0
    assert (tmp_path / "full.yaml").is_file() and not (tmp_path / "~").exists()


def test_the_nearest_setting_is_that_of_the_command() -> None:
    for stage in ("sft", "reward", "guard", "policy"):
        assert f"did you mean '{stage}.max_steps'" in error("train", stage, "max_steps=2")


def test_a_stage_names_the_next_command() -> None:
    overrides = ["data.path=my data", "output_dir=x"]
    assert next_command("sft", None, overrides) == "safe-rlhf-v train reward 'data.path=my data' output_dir=x"
    assert next_command("cost", Path("a.yaml"), None) == "safe-rlhf-v train policy --config a.yaml"
    assert next_command("direct", None, None) == "safe-rlhf-v evaluate"


def test_bars_are_for_terminals(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("data", "picture-world", "--out", tmp_path / "w", "--train", "4", "--evaluation", "2").exit_code == 0
    assert "\r" not in capfd.readouterr().err


def bars(stderr: int, before: str, log: Path) -> str:
    """Whether transformers draws bars in the command's process and in a fork of it that writes to a log."""
    script = f"""
import sys
from pathlib import Path
from safe_rlhf_v.cli import app
from safe_rlhf_v.jobs.forked import Forked
{before}
app(["--version"], standalone_mode=False)
from transformers.utils import logging
fork = Forked(lambda: print(logging.is_progress_bar_enabled(), flush=True), Path(sys.argv[1]), {{}})
fork.wait()
print(logging.is_progress_bar_enabled())
"""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("DISABLE_PROGRESS_BARS")}
    environment["PYTHONPATH"] = str(ROOT)
    ran = subprocess.run(
        [sys.executable, "-c", script, str(log)], stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
    )
    assert ran.returncode == 0
    return f"{ran.stdout.split()[-1]} {log.read_text().split()[-1]}"


def test_bars_of_transformers_are_for_terminals(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    assert bars(terminal, "", tmp_path / "a") == "True False"
    assert bars(terminal, "import transformers.utils.logging", tmp_path / "b") == "True False"
    assert bars(subprocess.DEVNULL, "", tmp_path / "c") == "False False"
    assert bars(subprocess.DEVNULL, "import transformers.utils.logging", tmp_path / "d") == "False False"
    for end in (main, terminal):
        os.close(end)


def test_a_missing_model_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in (tmp_path / "none", "./none", "models/none", "a/b/c"):
        said = error("train", "reward", f"model.path={name}", "data.path=nowhere")
        assert f"model.path = {name}: no such folder" in said
        assert f"model.start = {name}: no such folder" in error("train", "cost", f"model.start={name}")
    assert "no such folder;" not in error("train", "reward", "model.path=owner/name")  # perhaps a hub id


def bases(package: str) -> dict[str, set[str]]:
    """Each class of a package with the names of its bases."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / package).rglob("*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name: {ast.unparse(base) for base in node.bases} for node in classes}


def test_every_error_of_the_project_is_one_that_a_user_can_mend() -> None:
    """A new error class that is not says "fault of safe-rlhf-v" and ends with 70."""
    found = {name: of for package in ("beavertails_v", "safe_rlhf_v", "guard") for name, of in bases(package).items()}
    exceptions = {
        name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    ours = {"UserError"}
    while more := {name for name, of in found.items() if of & ours} - ours:
        ours |= more
    assert {name for name, of in found.items() if of & exceptions} - ours == set()
    assert len(ours) > 20


def test_a_class_that_is_not_ours_is_a_fault_wherever_it_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(ValueError):
        __module__ = "safe_rlhf_v.somewhere"

    assert ends(Other("no sentence for a user")) == 70 and "fault of safe-rlhf-v" in " ".join(
        capsys.readouterr().err.split()
    )
    assert ends(PolicyError("policy.yaml: no rules")) == 2
