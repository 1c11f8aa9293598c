"""Settings of the online loop: those it takes as its arguments, and what draws responses for it."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Lt
from pydantic import Field

from safe_rlhf_v.arguments import OnlineArguments
from safe_rlhf_v.config.sections import Section, section_of
from safe_rlhf_v.fields import Positive

#: The arguments of the online loop, but for where it writes and its seed.
OnlineSettings = section_of(OnlineArguments, base=Section, without=("output_dir", "seed", "disable_tqdm"))


class EngineSection(Section):
    """What draws the responses of rollouts."""

    kind: Literal["transformers", "vllm"] = Field("transformers", description="transformers: on the training weights; vllm: vLLM, which is sent the adapter before every rollout and needs roles: adapters.")
    cache: Literal["dynamic", "static"] = Field("dynamic", description="Keys and values of transformers: dynamic grows; static has room for the longest answer, and lets a GPU compile the decoding step.")
    url: str | None = Field(None, description="Address of a vLLM server that reads the same folders, such as http://localhost:8000; null runs vLLM in this process.")
    gpu_memory_utilization: Annotated[float, Gt(0), Lt(1)] = Field(0.3, description="Share of the GPU's memory that vLLM in this process takes; training has the rest. [ours]")
    max_model_len: Positive | None = Field(None, description="Longest prompt and answer that vLLM in this process has room for; null takes the model's.")
