"""A stand-in that speaks the part of vLLM's interface used here, on a tiny model: offline `LLM` and the HTTP server.

Greedy, so that its answers can be compared. It encodes texts and pictures by itself with the processor's own batching,
and answers with the adapter it was sent, which it reads from the folder as PEFT would.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from safe_rlhf_v.vlm.backbone import load_backbone
from safe_rlhf_v.vlm.processing import load_processor


class LLM:
    """vllm.LLM"""

    def __init__(self, model: str, **options: Any) -> None:
        self.path, self.options = model, options
        self.processor = load_processor(model)
        self.asked: list[Any] = []
        self.extra: list[int] = []  # ids put before every prompt: another tokenizer

    def generate(self, prompts: list[Any], settings: list[Any], *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        self.asked.append((settings, lora_request))
        model = load_backbone(self.path, adapter=lora_request.lora_path)
        return [self._answer(model, p, s) for p, s in zip(prompts, settings, strict=True)]

    def _answer(self, model: Any, prompt: Any, settings: Any) -> Any:
        images = prompt.get("multi_modal_data", {}).get("image")
        data = self.processor(text=[prompt["prompt"]], images=[images] if images else None, return_tensors="pt")
        output = model.generate(
            **data,
            do_sample=False,
            max_new_tokens=settings.max_tokens,
            eos_token_id=settings.stop_token_ids,
            suppress_tokens=[token for token, bias in settings.logit_bias.items() if bias == -100.0],
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        start = data["input_ids"].shape[1]
        outputs = [SimpleNamespace(token_ids=tuple(output[0, start:].tolist())) for _ in range(settings.n)]
        return SimpleNamespace(prompt_token_ids=self.extra + data["input_ids"][0].tolist(), outputs=outputs)


class SamplingParams(SimpleNamespace):
    """vllm.SamplingParams, which refuses several greedy samples."""

    def __init__(self, **options: Any) -> None:
        if options["temperature"] == 0 and options["n"] > 1:
            raise ValueError("n must be 1 when using greedy sampling")
        super().__init__(**options)


class LoRARequest(SimpleNamespace):
    """vllm.lora.request.LoRARequest"""

    def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
        super().__init__(lora_name=lora_name, lora_int_id=lora_int_id, lora_path=lora_path)


def install(patch: pytest.MonkeyPatch) -> None:
    """Let `import vllm` find the stand-in."""
    names = {"vllm": {"LLM": LLM, "SamplingParams": SamplingParams}, "vllm.lora": {}}
    names["vllm.lora.request"] = {"LoRARequest": LoRARequest}
    for name, members in names.items():
        module = ModuleType(name)
        module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
        module.__dict__.update(members)
        patch.setitem(sys.modules, name, module)


@contextmanager
def server(model: Path, token_ids: bool = True) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server on a free port: its address, and the requests it has had. token_ids=False: an old one."""
    inner, seen, adapters = LLM(str(model)), [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            if self.path == "/v1/load_lora_adapter":
                adapters[body["lora_name"]] = body["lora_path"]
                self._send(200, "Success: LoRA adapter added")
            elif self.path == "/v1/unload_lora_adapter":
                del adapters[body["lora_name"]]
                self._send(200, "Success: LoRA adapter removed")
            elif body["model"] not in adapters:
                self._send(404, f"The model `{body['model']}` does not exist.")
            else:
                self._send(200, json.dumps(self._chat(body)))

        def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
            parts = body["messages"][0]["content"]
            urls = [p["image_url"]["url"].partition(",")[2] for p in parts if p["type"] == "image_url"]
            images = [Image.open(io.BytesIO(base64.b64decode(url))) for url in urls]
            content = [{"type": "image"} if p["type"] == "image_url" else p for p in parts]
            text = inner.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            bias = {int(token): value for token, value in body["logit_bias"].items()}
            settings = SimpleNamespace(**{k: body[k] for k in ("n", "max_tokens", "stop_token_ids")}, logit_bias=bias)
            adapter = SimpleNamespace(lora_path=adapters[body["model"]])
            prompt = {"prompt": text} | ({"multi_modal_data": {"image": images}} if images else {})
            answer = inner.generate([prompt], [settings], lora_request=adapter, use_tqdm=False)[0]
            choices = [{"index": i, "token_ids": list(o.token_ids)} for i, o in enumerate(answer.outputs)]
            reply: dict[str, Any] = {"choices": choices[::-1]}
            if token_ids and body["return_token_ids"]:
                reply["prompt_token_ids"] = answer.prompt_token_ids
            return reply

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", seen
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def shake(parameters: Any, seed: int) -> None:
    """Move an adapter away from where it starts."""
    torch.manual_seed(seed)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=0.1)
