"""A training step of a reward model: each prompt read once for its two responses, against once with each of them.

    python benchmarks/pairs.py --size small

The two take turns on the same batch, adapters and weights. TRL's RewardTrainer reads a prompt with each response.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, replace

import torch
from common import LORA, Clock, build, default_work, machine, make_prompts, parser, setting, show, write

from safe_rlhf_v.types import Responses
from safe_rlhf_v.vlm.backbone import encode_images
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.memory import recompute_language
from safe_rlhf_v.vlm.processing import Encoder


def main() -> None:
    arguments = parser(__doc__ or "", "runs/benchmarks/pairs.json")
    arguments.add_argument("--rounds", type=int, default=3, help="steps of each that count")
    arguments.add_argument("--pairs", type=int, default=2, help="pairs of a step")
    arguments.add_argument("--new-tokens", type=int, help="tokens of a response")
    arguments.add_argument("--pixels", type=int, help="side of a picture; (pixels / 16)^2 tokens of the small models'")
    arguments.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    options = arguments.parse_args()
    device, dtype = setting(options)
    work = replace(default_work(options.size), prompts=options.pairs, samples=2)
    work = replace(work, new_tokens=options.new_tokens or work.new_tokens, pixels=options.pixels or work.pixels)
    backbone, processor = build(work, device, dtype)
    encoder = Encoder(processor, config=backbone.config)
    model = HeadedModel(backbone, {"score": 1}, LORA)
    if options.gradient_checkpointing:
        recompute_language(backbone)
    prompts = encode_images(backbone, encoder.prompts(make_prompts(work, work.prompts)).to(device)).repeat(2)
    ids = torch.randint(3, len(processor.tokenizer), (work.rows, work.new_tokens), device=device)
    responses = Responses(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool))
    clock = Clock(device)
    times: dict[str, list[float]] = {"once with each response": [], "once a pair": []}

    def step() -> None:
        model.zero_grad()
        better, worse = model(prompts, responses)["score"].view(-1, 2).unbind(1)
        (-torch.nn.functional.logsigmoid(better - worse)).mean().backward()

    for turn in range(options.rounds + 1):
        for name, found in times.items():
            model.one_forward = name != "once a pair"
            seconds = clock.time(step, repeats=1, warm=False)
            found += [seconds] if turn else []
    slow = statistics.median(times["once with each response"])
    rows = []
    for name, found in times.items():
        median = statistics.median(found)
        rows.append({"a prompt is read": name, f"{clock.unit} a step": median, "ratio": median / slow})
    length = prompts.input_ids.shape[1]
    show(f"{work.prompts} pairs, prompts of {length} tokens, responses of {work.new_tokens}", rows)
    write(options.out, {"machine": machine(device), "work": asdict(work), "rows": rows, "seconds": times})


if __name__ == "__main__":
    main()
