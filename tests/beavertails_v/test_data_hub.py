"""The hub, stood in for by a folder: what is asked of it, and what is made of its answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from data_files import official_row, write_parquet

from beavertails_v import SourceError, load_comparisons


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A repository of two categories at commit 'abc'; records the downloads."""
    root = tmp_path / "snapshots" / "abc"
    for category in ("animal_abuse", "sexual_crimes"):
        for split in ("train", "evaluation"):
            row = official_row(category=category, question=f"{category} {split}")
            write_parquet(root / "data" / category / f"{split}.parquet", [row])
    (root / "README.md").write_text("card")
    calls: list[dict[str, Any]] = []

    def info(_: Any, repository: str, revision: str | None = None) -> SimpleNamespace:
        calls.append({"repository": repository, "revision": revision})
        names = [f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file()]
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository, **options})
        return str(root)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize("name", ["saferlhf-v/BeaverTails-V", "PKU-Alignment/PKU-SafeRLHF-V"])
def test_only_the_files_of_the_split_are_fetched_at_one_commit(asked: list[dict[str, Any]], name: str) -> None:
    pairs = load_comparisons(name, "evaluation", revision="main")
    assert [p.prompt.text for p in pairs] == ["animal_abuse evaluation", "sexual_crimes evaluation"]
    assert pairs.report.revision == "abc"
    assert asked[0] == {"repository": name, "revision": "main"}
    assert asked[1] == {
        "repository": name,
        "repo_type": "dataset",
        "revision": "abc",
        "allow_patterns": ["data/animal_abuse/evaluation.parquet", "data/sexual_crimes/evaluation.parquet"],
    }


def test_only_the_categories_asked_for_are_fetched(asked: list[dict[str, Any]]) -> None:
    assert len(load_comparisons("saferlhf-v/BeaverTails-V", categories=["animal_abuse"])) == 1
    assert asked[1]["allow_patterns"] == ["data/animal_abuse/train.parquet"]


def test_a_missing_split_is_an_error_before_anything_is_fetched(asked: list[dict[str, Any]]) -> None:
    with pytest.raises(SourceError, match="no split 'test'; there is evaluation, train"):
        load_comparisons("saferlhf-v/BeaverTails-V", "test")
    assert len(asked) == 1


def test_offline_reads_what_is_cached(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pairs = load_comparisons("saferlhf-v/BeaverTails-V")
    assert len(pairs) == 2 and pairs.report.revision == "abc"
    assert len(asked) == 1 and asked[0]["local_files_only"] is True


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"owner/name: neither a file or folder here(.|\n)*no route"):
        load_comparisons("owner/name")
