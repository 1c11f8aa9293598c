import os
from pathlib import Path

import pytest

from safe_rlhf_v.files import replace_text, replacing


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "target.txt").write_text("old", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to("there/target.txt")
    (tmp_path / "second.txt").symlink_to("link.txt")
    (tmp_path / "dangling.txt").symlink_to("there/new.txt")
    replace_text(tmp_path / "second.txt", "new")
    replace_text(tmp_path / "dangling.txt", "made")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "second.txt").is_symlink()
    assert (tmp_path / "there" / "target.txt").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "there" / "new.txt").read_text(encoding="utf-8") == "made"
    assert sorted(os.listdir(tmp_path / "there")) == ["new.txt", "target.txt"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_text(tmp_path / "pipe", "said")
    assert os.read(reader, 100) == b"said"
    os.close(reader)
    assert not (tmp_path / "pipe").is_file() and os.listdir(tmp_path) == ["pipe"]


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path, "x")


def test_half_a_character_pair_is_written_as_its_escape(tmp_path: Path) -> None:
    replace_text(tmp_path / "x.json", '"\ud83d"')
    assert (tmp_path / "x.json").read_bytes() == b'"\\ud83d"'


def test_where_writing_fails_the_old_file_stays(tmp_path: Path) -> None:
    replace_text(tmp_path / "x", "old")

    def stopped() -> None:
        with replacing(tmp_path / "x") as beside:
            beside.write_text("half", encoding="utf-8")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped()
    assert (tmp_path / "x").read_text(encoding="utf-8") == "old"
