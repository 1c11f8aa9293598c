"""What the benchmarks share: models without a hub, prompts, contenders' clocks, tables and files.

Weights are random: speed and memory do not depend on what a model knows. Every response runs to its limit, since the
end-of-sequence logit is pushed down in all of them: contenders do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from beavertails_v.images import Picture
from beavertails_v.picture_world import vocabulary
from beavertails_v.schema import Prompt
from safe_rlhf_v.algorithms.group_lag import GroupLag
from safe_rlhf_v.algorithms.ppo_lag import PPOLag
from safe_rlhf_v.demo.tiny import tiny_llava, word_tokenizer
from safe_rlhf_v.duals import LogDual
from safe_rlhf_v.online.loop import OnlineArguments, OnlineTrainer
from safe_rlhf_v.roles.protocol import AdapterRoles, Roles
from safe_rlhf_v.vlm.adapters import LoraSettings, add_lora
from safe_rlhf_v.vlm.heads import HeadedModel
from safe_rlhf_v.vlm.processing import Encoder
from safe_rlhf_v.vlm.quirks import NoVideos

LORA = LoraSettings(r=16, alpha=32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """N prompts with `images` pictures of `pixels` each, G samples of exactly `new_tokens`; an optimizer step on all.

    vocabulary: tokens of the tiny model; 0 is the picture world's own. micro_batch: rows of a pass; 0 for all.
    """

    size: str = "tiny"
    prompts: int = 4
    images: int = 1
    samples: int = 4
    new_tokens: int = 24
    vocabulary: int = 0
    pixels: int = 64
    micro_batch: int = 0
    gradient_checkpointing: bool = False

    @property
    def rows(self) -> int:
        return self.prompts * self.samples


SHAPES: dict[str, dict[str, int]] = {
    "tiny": {},
    "small": dict(hidden_size=576, layers=30, vision_layers=12, heads=9),  # depth and width of SmolLM2-135M
}
QWEN_7B: dict[str, Any] = dict(  # config.json of Qwen2.5-VL-7B-Instruct
    text_config=dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=128000, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    ),
    vision_config=dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, patch_size=14,
        window_size=112, fullatt_block_indexes=[7, 15, 23, 31], spatial_merge_size=2, temporal_patch_size=2,
    ),
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(work: Work, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model of random weights, frozen in eval mode, and its processor."""
    torch.manual_seed(0)
    if work.size in SHAPES:
        words = list(vocabulary())
        words += [f"word{i}" for i in range(work.vocabulary - len(word_tokenizer(words)))]
        model, processor = tiny_llava(words, image_size=work.pixels, **SHAPES[work.size])
        model.to(device=device, dtype=dtype)
    else:
        model, processor = _qwen_7b(work, device, dtype)
    _never_end(model, processor.tokenizer.eos_token_id)
    return model.requires_grad_(False).eval(), processor


def _qwen_7b(work: Work, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Its real configuration; a small byte-level tokenizer in place of its own uses the first few hundred ids."""
    names = ["vision_start", "vision_end", "vision_pad", "image_pad", "video_pad", "im_start"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator([" ".join(vocabulary())], trainer)
    special = [f"<|{name}|>" for name in names]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special,
        padding_side="left",
    )  # fmt: skip
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in names[:2] + names[3:5]}
    config = Qwen2_5_VLConfig(**QWEN_7B, **ids, pad_token_id=tokenizer.pad_token_id)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    torch.set_default_dtype(before)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    pictures = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2)
    videos = NoVideos(video_processor_type="Qwen2VLVideoProcessor", patch_size=14)
    return model, Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=TEMPLATE)


def _never_end(model: Any, eos_id: int) -> None:
    """Push the end-of-sequence logit down wherever the output layer is used, in training and generation alike."""

    def push(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([eos_id], device=logits.device), -1e4)

    model.get_output_embeddings().register_forward_hook(push)


def make_prompts(work: Work, count: int) -> list[Prompt]:
    """Prompts with pictures of noise, no two alike, and questions of two lengths."""
    random = np.random.default_rng(0)
    noise = lambda: random.integers(0, 256, (work.pixels, work.pixels, 3), dtype=np.uint8)  # noqa: E731
    pictures = [tuple(Picture.from_pil(Image.fromarray(noise())) for _ in range(work.images)) for _ in range(count)]
    texts = ("what is in the picture ?", "how do i carry this to school under my coat ?")
    return [Prompt(text=texts[i % 2], images=images) for i, images in enumerate(pictures)]


def adapter_roles(work: Work, device: torch.device, dtype: torch.dtype, *, critics: bool, **options: Any) -> Roles:
    """All roles on one backbone, reward and cost model included."""
    model, processor = build(work, device, dtype)
    heads = {}
    names = ["reward", "cost"] + (["reward_critic", "cost_critic"] if critics else [])
    add_lora(model, LORA, "policy")
    for name in names:
        add_lora(model, LORA, name)
        heads[name] = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False, device=device)
    return AdapterRoles(model, Encoder(processor, config=model.config), heads, **options)


def headed(work: Work, device: torch.device, dtype: torch.dtype, name: str) -> HeadedModel:
    model, _ = build(work, device, dtype)
    return HeadedModel(model, {name: 1})


def trainer(roles: Roles, work: Work, folder: Path, *, critics: bool, scorer: Any = None, **changes: Any) -> Any:
    """Our online trainer on this work: one optimizer step a rollout, no demonstrations."""
    arguments: dict[str, Any] = dict(
        per_device_train_batch_size=work.prompts, num_generations=work.samples, mini_batch_size=work.rows,
        max_new_tokens=work.new_tokens, learning_rate=1e-5, critic_learning_rate=1e-5, disable_tqdm=True,
    )  # fmt: skip
    args = OnlineArguments(output_dir=folder, **(arguments | changes))
    algorithm: Any = PPOLag() if critics else GroupLag()
    constraint = algorithm.constraint(LogDual(0.1, 1.0, 5.0))
    return OnlineTrainer(roles, algorithm, constraint, make_prompts(work, work.prompts * 4), args, scorer)


class Clock:
    """Seconds of a device: wall time of a GPU, once it has finished; CPU time of this process on a CPU, which does not
    depend on what else the machine does."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.unit = "s" if device.type == "cuda" else "CPU s"

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def time(self, work: Any, repeats: int = 3, warm: bool = True) -> float:
        """The least seconds of `repeats` calls, after one that is not counted."""
        times = []
        for i in range(repeats + warm):
            start = self()
            work()
            times += [self() - start] if i >= warm else []
        return min(times)


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the GPU's allocator, or resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parser(description: str, out: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--size", choices=(*SHAPES, "qwen2.5-vl-7b"), default="tiny", help="model; weights are random")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    found.add_argument("--out", type=Path, default=Path(out), help="JSON file to write")
    return found


def setting(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """bfloat16 on a GPU, float32 on a CPU."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


def default_work(size: str) -> Work:
    """256 tokens of a picture and 256 new tokens of a 7B model; smaller versions of it on a CPU."""
    if size == "tiny":
        return Work()
    if size == "small":
        return Work(size=size, prompts=2, new_tokens=32, vocabulary=32768, pixels=256)
    return Work(size=size, prompts=4, samples=4, new_tokens=256, pixels=448)


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table of the rows; the first row's keys are its columns."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
