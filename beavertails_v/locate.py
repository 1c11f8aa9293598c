"""Which files hold a split: in a local folder or on the hub, by the names of the files alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from beavertails_v.sources import SourceError
from beavertails_v.taxonomy import BENIGN, Taxonomy, TaxonomyError

_FILE = r"(?P<split>[^/]+?)(?:-\d+-of-\d+)?\.(?P<suffix>parquet|jsonl)"
#: Where the files of a split may stand, the official layout first; the first that any file fits is taken.
_LAYOUTS = tuple(re.compile(p + _FILE) for p in (r"data/(?P<folder>[^/]+)/", r"(?P<folder>[^/]+)/", r"data/", r""))
_DEPTHS = ("*", "*/*", "data/*/*")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Stems of a single file that name a split; any other single file is read whole, whichever split is asked for.
_SPLIT_NAMES = frozenset({"train", "evaluation", "eval", "test", "validation"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of one split, in order. revision: hub commit, or None for local files."""

    root: Path
    names: tuple[str, ...]
    revision: str | None = None

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]


def locate(source: str | Path, split: str, categories: Collection[str] | None, revision: str | None) -> Files:
    """Find a split's files; from the hub, only those are fetched. Raises SourceError naming what there is instead."""
    path = Path(source)
    if path.is_file():
        if path.stem in _SPLIT_NAMES - {split}:
            raise SourceError(f"{path}: this file is the split {path.stem!r}, and {split!r} was asked for")
        return Files(root=path.parent, names=(path.name,))
    if path.is_dir():
        names = [f.relative_to(path).as_posix() for depth in _DEPTHS for f in path.glob(depth)]
        return Files(root=path, names=choose(names, split, categories, str(source)))
    if not _HUB_ID.fullmatch(str(source)):
        raise SourceError(f"{source}: no such file or folder, and not a hub id of the form owner/name")
    return _from_hub(str(source), split, categories, revision)


def choose(names: Iterable[str], split: str, categories: Collection[str] | None, source: str) -> tuple[str, ...]:
    """The names of the files that hold `split`, and of these categories where folders are named for categories."""
    names = sorted(set(names))
    for layout in _LAYOUTS:
        found = [(match, name) for name in names if (match := layout.fullmatch(name))]
        if found:
            break
    else:
        raise SourceError(f"{source}: holds no data: no data/<category>/<split>.parquet and no <split>.jsonl")
    of_split = [(match, name) for match, name in found if match["split"] == split]
    if not of_split:
        there = ", ".join(sorted({match["split"] for match, _ in found}))
        raise SourceError(f"{source}: no split {split!r}; there is {there}")
    _refuse_twins(of_split, source)
    return tuple(name for _, name in sorted(_of_categories(of_split, categories, source), key=_official_order))


def _refuse_twins(found: list[tuple[re.Match[str], str]], source: str) -> None:
    for name in (name for _, name in found if name.endswith(".jsonl")):
        twin = name.removesuffix("jsonl") + "parquet"
        if any(twin == other for _, other in found):
            raise SourceError(f"{source}: both {name} and {twin} hold the split; remove one, or name the file you mean")


def _of_categories(
    found: list[tuple[re.Match[str], str]], categories: Collection[str] | None, source: str
) -> list[tuple[re.Match[str], str]]:
    """Leaves out folders of other categories; a folder not named for a category is kept, its rows are looked at."""
    taxonomy = Taxonomy.load()
    folders = [match.groupdict().get("folder") for match, _ in found]
    if categories is None or not all(f in taxonomy.parents or f == BENIGN for f in folders):
        return found
    missing = [c for c in categories if c not in folders]
    if missing:
        there = ", ".join(sorted(str(f) for f in set(folders)))
        raise SourceError(f"{source}: no category {', '.join(map(repr, missing))} in this split; there is {there}")
    return [(match, name) for match, name in found if match["folder"] in categories]


def _official_order(item: tuple[re.Match[str], str]) -> tuple[int, str]:
    taxonomy = Taxonomy.load()
    folder = str(item[0].groupdict().get("folder"))
    return (taxonomy.index(folder) if folder in taxonomy.parents else len(taxonomy.secondary)), item[1]


def _from_hub(source: str, split: str, categories: Collection[str] | None, revision: str | None) -> Files:
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        if constants.HF_HUB_OFFLINE:
            root = Path(hub.snapshot_download(source, repo_type="dataset", revision=revision, local_files_only=True))
            names = [f.relative_to(root).as_posix() for depth in _DEPTHS for f in root.glob(depth)]
            return Files(root=root, names=choose(names, split, categories, source), revision=root.name)
        info = hub.HfApi().dataset_info(source, revision=revision)
        chosen = choose([f.rfilename for f in info.siblings or ()], split, categories, source)
        root = Path(hub.snapshot_download(source, repo_type="dataset", revision=info.sha, allow_patterns=list(chosen)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SourceError(
            f"{source}: neither a file or folder here, nor to be had from the hub ({type(error).__name__}: {error}); "
            "check the name, the revision and the network, or give a local folder"
        ) from error
    return Files(root=root, names=chosen, revision=info.sha)


def require_categories(categories: Collection[str]) -> None:
    """Raise TaxonomyError unless each is a BeaverTails-V category or 'benign'."""
    if isinstance(categories, str):
        raise TaxonomyError(f"categories is the text {categories!r}; give a list, such as [{categories!r}]")
    Taxonomy.load().require(categories, also=(BENIGN,))
