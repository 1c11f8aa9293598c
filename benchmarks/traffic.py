"""What more devices would give, by the traffic model: seconds of a rollout and its update, and what saturates.

    python benchmarks/traffic.py CONFIG_FOLDER [--nodes 1 2 4 8]

CONFIG_FOLDER holds the model's config.json; weights are not needed. A plan, not a measurement: bytes are those that
tests count between two CPU processes, the speeds are data-sheet figures given as options, and nothing overlaps.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from safe_rlhf_v.distributed.communication import Hardware, Work, ddp, fsdp2, hybrid_seconds, seconds
from safe_rlhf_v.planning.footprint import sizes
from safe_rlhf_v.vlm.adapters import LoraSettings


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a config.json")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--gpus", type=int, default=8, help="devices a node")
    parser.add_argument("--tflops", type=float, default=989, help="dense bfloat16 peak of a device (H100 SXM: 989)")
    parser.add_argument("--reached", type=float, default=0.2, help="share of that peak that compute reaches")
    parser.add_argument("--memory", type=float, default=3350, help="GB/s of a device's memory (H100 SXM: 3350)")
    parser.add_argument("--inside", type=float, default=450, help="GB/s one way inside a node (NVLink 4: 450)")
    parser.add_argument("--between", type=float, default=50, help="GB/s a device between nodes (400 Gb/s: 50)")
    parser.add_argument("--rows", type=int, default=4, help="prompts a device and rollout")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--response", type=int, default=512)
    return parser.parse_args()


def main() -> None:
    at = options()
    size = sizes(at.model, "bfloat16", lora=LoraSettings(r=at.rank))
    work = Work(updates=at.rows, steps=1, demonstrations=at.rows)
    sharded = fsdp2(work, size.language, size.language)
    kinds = {
        "FSDP2 over all": (sharded, size.language),
        "FSDP2 in a node, replicated between": (sharded, size.language),
        "DDP, adapters": (ddp(work, 4 * size.adapter), size.weights),
    }
    print("| | GPUs | GB a GPU | generation s | compute s | communication s | most | prompts/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (traffic, weights) in kinds.items():
        for nodes in at.nodes:
            devices, link = nodes * at.gpus, at.inside if nodes == 1 else at.between
            hardware = Hardware(flops=at.tflops * at.reached * 1e12, memory=at.memory * 1e9, link=link * 1e9)
            took = seconds(
                work, traffic, hardware, devices, parameters=size.trainable, weights=weights, rows=at.rows,
                prompt=at.prompt, response=at.response,
            )  # fmt: skip
            if "copied" in name:
                communication = hybrid_seconds(traffic, at.gpus, nodes, at.inside * 1e9, at.between * 1e9)
                took = replace(took, communication=communication)
            total = took.generation + took.compute + took.communication
            sent = traffic.on_the_wire(at.gpus if "copied" in name else devices) / 1e9
            parts = " | ".join(f"{x:.1f}" for x in (sent, took.generation, took.compute, took.communication))
            print(f"| {name} | {devices} | {parts} | {took.saturated} | {at.rows * devices / total:.1f} |")


if __name__ == "__main__":
    main()
