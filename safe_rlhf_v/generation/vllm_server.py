"""A vLLM that runs elsewhere, spoken to over HTTP; it must see the folder that adapters are put into.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 16 --generation-config vllm
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request as HTTPRequest
from urllib.request import urlopen

from PIL.Image import Image

from safe_rlhf_v.generation.vllm_engine import Completion, Request
from safe_rlhf_v.vlm.source import ModelError

AT_ONCE = 32  # requests under way; the server forms its own batches


class VLLMServer:
    """The `Client` of `VLLMEngine` for a server at `url`. timeout: seconds a request may take."""

    def __init__(self, url: str, timeout: float = 600.0) -> None:
        self.url, self.timeout = url.rstrip("/").removesuffix("/v1"), timeout
        self._adapter: str | None = None

    def load_adapter(self, name: str, number: int, folder: Path) -> None:
        before, self._adapter = self._adapter, name
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
        if before is not None:
            self._post("unload_lora_adapter", {"lora_name": before})

    def complete(self, requests: Sequence[Request], options: dict[str, Any]) -> list[Completion]:
        with ThreadPoolExecutor(min(AT_ONCE, max(1, len(requests)))) as pool:
            return list(pool.map(partial(self._complete, options=options), requests))

    def _complete(self, request: Request, options: dict[str, Any]) -> Completion:
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _png(i)}} for i in request.images]
        content.append({"type": "text", "text": request.question})
        reply = self._post(
            "chat/completions",
            options
            | {
                "model": self._adapter,
                "messages": [{"role": "user", "content": content}],
                "seed": request.seed,
                "return_token_ids": True,
                "logit_bias": {str(token): bias for token, bias in options["logit_bias"].items()},
            },
        )
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if reply.get("prompt_token_ids") is None or any(c.get("token_ids") is None for c in choices):
            raise ModelError(f"{self.url}: the server sends no token ids back (return_token_ids); take a newer vLLM")
        return Completion(prompt_ids=reply["prompt_token_ids"], responses=[choice["token_ids"] for choice in choices])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = HTTPRequest(
            f"{self.url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urlopen(request, timeout=self.timeout) as reply:
                text = reply.read().decode()
        except HTTPError as error:
            why = error.read().decode(errors="replace").strip()[:300]
            raise ModelError(f"{self.url}/v1/{path}: the vLLM server answers {error.code}: {why}") from error
        except (URLError, TimeoutError) as error:
            raise ModelError(
                f"{self.url}: no vLLM server answers ({getattr(error, 'reason', error)}); start one with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora, or correct policy.engine.url"
            ) from error
        return json.loads(text) if text.startswith("{") else text  # loading an adapter is answered in plain words


def _png(image: Image) -> str:
    """The picture as a data URL, without loss."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
