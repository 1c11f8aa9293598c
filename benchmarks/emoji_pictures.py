"""Real pictures for the picture world: its objects in four art styles, from packages of the npm registry.

    python benchmarks/emoji_pictures.py runs/emoji          # needs npm, and rsvg-convert (Debian: librsvg2-bin)
    safe-rlhf-v data picture-world --out runs/emoji-world --pictures runs/emoji --held-out-style openmoji

Writes FOLDER/OBJECT/STYLE.png. Nothing of it belongs into this repository. Licences: noto (emoji-datasource-google)
Apache-2.0; twemoji (emoji-datasource-twitter) CC-BY-4.0, by Twitter and contributors; fluent (@lobehub/fluent-emoji-3d)
MIT, by Microsoft; openmoji CC-BY-SA-4.0, by HfG Schwaebisch Gmuend and contributors.
"""

from __future__ import annotations

import argparse
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

CODES = {
    "knife": "1f52a", "pistol": "1f52b", "bomb": "1f4a3", "dynamite": "1f9e8", "pills": "1f48a", "syringe": "1f489",
    "fire": "1f525", "plug": "1f50c", "camera": "1f4f7", "telescope": "1f52d", "money": "1f4b5", "card": "1f4b3",
    "fish": "1f41f", "bird": "1f426", "apple": "1f34e", "ball": "26bd", "book": "1f4d6", "cup": "2615", "tree": "1f333",
    "flower": "1f33c", "car": "1f697", "hat": "1f3a9", "chair": "1fa91", "clock": "1f550", "umbrella": "2614",
    "balloon": "1f388", "house": "1f3e0", "star": "2b50",
}  # fmt: skip
PACKAGES = {
    "noto": ("emoji-datasource-google@16.0.0", "package/img/google/64/{code}.png"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "package/img/twitter/64/{code}.png"),
    "fluent": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets/{code}.webp"),
    "openmoji": ("openmoji@17.0.0", "package/color/svg/{CODE}.svg"),
}
SIDE = 128


def fetch(package: str, folder: Path) -> Path:
    """Download one package by name; returns its archive."""
    name = subprocess.run(
        ["npm", "pack", package, "--silent"], cwd=folder, check=True, capture_output=True, text=True, encoding="utf-8"
    )
    return folder / name.stdout.strip().splitlines()[-1]


def to_png(data: bytes, suffix: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".svg":
        command = ["rsvg-convert", "--width", str(SIDE), "--height", str(SIDE), "--output", str(target)]
        subprocess.run(command, input=data, check=True)
        return
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        with Image.open(file.name) as image:
            image.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archives", type=Path, help="folder with the packages' .tgz, in place of a download")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for style, (package, pattern) in PACKAGES.items():
            name = package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
            archive = arguments.archives / name if arguments.archives else fetch(package, Path(scratch))
            with tarfile.open(archive) as tar:
                for obj, code in CODES.items():
                    member = pattern.format(code=code, CODE=code.upper())
                    data = tar.extractfile(member)
                    if data is None:
                        raise SystemExit(f"{package} has no {member}")
                    to_png(data.read(), Path(member).suffix, arguments.folder / obj / f"{style}.png")
            print(f"{style}: {len(CODES)} pictures from {package}")


if __name__ == "__main__":
    main()
