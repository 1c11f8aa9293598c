"""Which files hold a split: in a local folder or on the hub, by the names of the files alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from beavertails_v.sources import SourceError
from beavertails_v.store import conversion
from beavertails_v.taxonomy import BENIGN, UNCATEGORISED, Taxonomy, TaxonomyError

_SHARD = r"-(?P<shard>\d{5})-of-(?P<shards>\d{5})(?:-[0-9a-f]{16})?"  # with a hash, as older push_to_hub wrote them
_FILE = rf"(?P<split>[^/]+?)(?:{_SHARD})?\.(?P<suffix>parquet|jsonl|jsonl\.gz)"
#: Where the files of a split may stand, the official layout first.
_LAYOUTS = tuple(
    re.compile(p + _FILE) for p in (r"data/(?P<folder>[^/]+)/", r"data/", r"", r"(?P<folder>(?!data/)[^/]+)/")
)
_DEPTHS = ("*", "*/*", "data/*/*")
#: Names of files that hold rows and are not read by these names.
_ALIKE = re.compile(r".*\.(?:(?:jsonl|parquet)(?:\.\w+)?|ndjson(?:\.\w+)?|jsonlines)", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: Stems of a single file that name a split; any other single file is read whole, whichever split is asked for.
_SPLIT_NAMES = frozenset({"train", "evaluation", "eval", "test", "validation"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of one split, in order. revision: hub commit, or None for local files. notes: what was passed over."""

    root: Path
    names: tuple[str, ...]
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> list[Path]:
        return [self.root / name for name in self.names]


def locate(source: str | Path, split: str, categories: Collection[str] | None, revision: str | None) -> Files:
    """Find a split's files; from the hub, only those are fetched. Raises SourceError naming what there is instead."""
    if not str(source).strip():
        raise SourceError("the source of the data is an empty text; give a folder, a file or a hub id")
    path = Path(source)
    if path.is_file():
        if _stem(path) in _SPLIT_NAMES - {split}:
            raise SourceError(f"{path}: this file is the split {_stem(path)!r}, and {split!r} was asked for")
        return Files(root=path.parent, names=(path.name,))
    if path.is_dir():
        names = _listing(path)
        chosen = choose(names, split, categories, str(source))
        return Files(root=path, names=chosen, notes=_passed_over(names, split, chosen, str(source)))
    if not _HUB_ID.fullmatch(str(source)):
        raise SourceError(f"{source}: no such file or folder, and not a hub id of the form owner/name")
    return _from_hub(str(source), split, categories, revision)


def splits(source: str | Path) -> list[str]:
    """The splits a local folder holds, training first; of a single file or a hub id, `train` alone."""
    path = Path(source)
    if not path.is_dir():
        named = path.is_file() and _stem(path) in _SPLIT_NAMES
        return [_stem(path) if named else "train"]
    found = {match["split"] for layout in _fitting(_listing(path), str(source)) for match, _ in layout}
    ours = {name for name in found if name in _SPLIT_NAMES} or found
    return sorted(ours, key=lambda name: (name != "train", name))


def _stem(path: Path) -> str:
    match = _LAYOUTS[2].fullmatch(path.name)
    return match["split"] if match else path.stem


def _listing(folder: Path) -> list[str]:
    """Files that may hold data, relative to the folder; what is hidden (a name with a dot first) never does."""
    found = [f for depth in _DEPTHS for f in folder.glob(depth) if not _hidden(f.relative_to(folder).as_posix())]
    for file in found:
        if file.is_symlink() and not file.exists() and any(p.fullmatch(_below(file, folder)) for p in _LAYOUTS):
            raise SourceError(f"{file}: a link to {file.readlink()}, which is not there; fetch it or drop the link")
    return [_below(file, folder) for file in found if file.is_file()]


def _below(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


Found = list[tuple[re.Match[str], str]]


def _fitting(names: Iterable[str], source: str) -> list[Found]:
    """The data files of each layout, the official one first. Raises SourceError where there are none at all."""
    names = sorted(name for name in set(names) if not _hidden(name))
    layouts = [[(match, name) for name in names if (match := layout.fullmatch(name))] for layout in _LAYOUTS]
    if not any(layouts):
        raise SourceError(f"{source}: {_why_no_data(names, source)}")
    return layouts


def _why_no_data(names: Sequence[str], source: str) -> str:
    """What the folder is instead, and how to make it readable."""
    saved = sorted({str(Path(n).parent) for n in names if Path(n).name == "state.json"})
    if saved or "dataset_dict.json" in names:
        part = f"[{saved[0]!r}]" if saved and saved[0] != "." else ""
        target = f"{source}/{saved[0] if part else 'train'}.parquet"
        return (
            "a folder written by save_to_disk of the `datasets` library; convert each split in Python: "
            f"from datasets import load_from_disk; load_from_disk({source!r}){part}.to_parquet({target!r})"
        )
    if (alike := next((name for name in names if _ALIKE.fullmatch(Path(name).name)), None)) is not None:
        return f"holds {alike}, which is not read: unpack it and name it <split>.jsonl or .parquet, in small letters"
    for name in names:
        if Path(name).suffix in (".csv", ".tsv", ".json", ".tar", ".arrow") and (how := conversion(f"{source}/{name}")):
            kind = "WebDataset archives" if name.endswith(".tar") else f"a {Path(name).suffix} file"
            return f"holds {kind} ({name}) and no .parquet or .jsonl; convert it in Python: {how}"
    deep = (f for kind in ("parquet", "jsonl", "jsonl.gz") for f in Path(source).rglob(f"*.{kind}") if f.is_file())
    if (file := next((f for f in deep if not _hidden(_below(f, Path(source)))), None)) is not None:
        return f"the data lie deeper than is looked ({_below(file, Path(source))}); name the folder {file.parent}"
    if any(Path(name).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp") for name in names):
        return (
            "holds pictures alone, such as an imagefolder; write a <split>.jsonl beside them that names a picture and "
            "gives question, responses and labels in each line (docs/data.md)"
        )
    return "holds no data: no data/<category>/<split>.parquet and no <split>.jsonl"


def choose(names: Iterable[str], split: str, categories: Collection[str] | None, source: str) -> tuple[str, ...]:
    """The names of the files that hold `split`, and of these categories where folders are named for categories.

    Raises SourceError where two layouts hold the split, a shard is missing, or two files hold the same shard.
    """
    layouts = _fitting(names, source)
    of_split = [[(match, name) for match, name in found if match["split"] == split] for found in layouts]
    holding = [found for found in of_split if found]
    if not holding:
        there = ", ".join(sorted({match["split"] for found in layouts for match, _ in found}))
        raise SourceError(f"{source}: no split {split!r}; there is {there}")
    if of_split[3] and len(holding) > 1 and not _named_for_categories(of_split[3]):
        holding.remove(of_split[3])  # a folder beside the data, such as a backup; `_passed_over` says so
    if len(holding) > 1:
        raise SourceError(
            f"{source}: both {holding[0][0][1]} and {holding[1][0][1]} hold the split {split!r}, in two layouts; "
            "remove one, or name the file or folder you mean"
        )
    _refuse_twins(holding[0], source)
    return tuple(name for _, name in sorted(_of_categories(holding[0], categories, source), key=_official_order))


def _named_for_categories(found: Found) -> bool:
    folders = {match["folder"] for match, _ in found}
    return bool(folders & {*Taxonomy.load().parents, BENIGN, UNCATEGORISED})


def _passed_over(names: Iterable[str], split: str, chosen: Sequence[str], source: str) -> tuple[str, ...]:
    """Notes on files of the split that stand beside the data and are not read, or beside categories and are."""
    read = [(match, name) for layout in _LAYOUTS for name in chosen if (match := layout.fullmatch(name))]
    if _named_for_categories([(match, name) for match, name in read if "folder" in match.groupdict()]):
        odd = [name for match, name in read if not _named_for_categories([(match, name)])]
        return tuple(f"{source}: {name} is read too, though its folder is named for no category" for name in odd)
    if any(len(Path(name).parts) > 1 for name in chosen) and not any(name.startswith("data/") for name in chosen):
        return ()
    others = [name for match, name in _fitting(names, source)[3] if match["split"] == split]
    return tuple(f"{source}: {name} is not read, since {chosen[0]} holds the split" for name in others)


def _refuse_twins(found: Found, source: str) -> None:
    """Two files that hold the same rows, or shards of which one is missing."""
    places: dict[tuple[str, str], list[tuple[re.Match[str], str]]] = {}
    for match, name in found:
        places.setdefault((name.rpartition("/")[0], match["split"]), []).append((match, name))
    for files in places.values():
        seen: dict[int, str] = {}
        totals = {int(match["shards"] or 1) for match, _ in files}
        for match, name in files:
            twin = seen.setdefault(int(match["shard"] or 0), name)
            if twin != name:
                raise SourceError(
                    f"{source}: both {twin} and {name} hold the split; remove one, or name the file you mean"
                )
        if len(totals) > 1 or set(seen) != set(range(max(totals))):
            lacking = sorted(set(range(max(totals))) - set(seen))
            raise SourceError(
                f"{source}: {files[0][1]} is one of {max(totals)} shards, and "
                + (
                    f"number {lacking[0]:05d} is not there; fetch it"
                    if lacking
                    else "others say another number of shards"
                )
            )


def _of_categories(found: Found, categories: Collection[str] | None, source: str) -> Found:
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
            names = _listing(root)
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
