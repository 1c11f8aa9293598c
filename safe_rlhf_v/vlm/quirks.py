"""What differs between model families, as data. A family that needs nothing here needs nothing anywhere.

Everything else in this package treats every `AutoModelForImageTextToText` alike.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import BaseVideoProcessor
from transformers.utils import PushToHubMixin

# Special tokens that stand for, or fence, the features of a picture, a video or a sound, in any family seen so far:
# <image>, <|image_pad|>, <|video_pad|>, <|vision_start|>, <fake_token_around_image>, <global-img>, <row_1_col_2>,
# <img>, <IMG_CONTEXT>, <start_of_image>, <boi_token>, <|audio_bos|>, <image_soft_token>, <patch> ...
# A model that samples one of them dies at its next forward, or is silently corrupted.
MODALITY_TOKEN = re.compile(
    r"(image|img|video|vision|visual|audio|speech|frame|patch|^<row_\d+_col_\d+>$|^<\|?[be]o[iav](_token)?\|?>$)",
    re.IGNORECASE,
)
# Attributes of a config or a processor that hold the id of such a token.
MODALITY_ATTRIBUTE = re.compile(
    r"^((image|video|audio|vision|fake_image|global_image|img|[be]o[iav])_?\w*token(_id|_ids|_index)?|row_col_ids)$"
)

# Attributes of a text config that change the logits after the output embedding: logits = f(head(hidden)).
LOGIT_DIVISORS = ("logits_scaling",)  # Granite: logits / scaling
LOGIT_FACTORS = ("logit_scale",)  # Cohere: logits * scale
LOGIT_CAPS = ("final_logit_softcapping",)  # Gemma: cap * tanh(logits / cap)

# Vision inputs that the encoder consumes; they are left out of the forward once features are known. All others
# (image_grid_thw, ...) stay: positions are computed from them.
PIXEL_INPUT = re.compile(r"^(pixel_values\w*|pixel_attention_mask|pixel_mask|image_patches)$")

# Vision inputs with a token dimension, (1, P, ...) of a row: zero on pads; response tokens see what the prompt's last
# token sees, as generation has it.
TOKEN_ALIGNED = frozenset({"cross_attention_mask"})  # Mllama

# A row whose vision inputs have one of these shares a forward only with rows of the same shapes there, so of as many
# pictures. Mllama's tokens before a picture attend to all pictures of the row alike, padding included, and rows without
# pictures skip layers: filled up to the same shapes, a row's states would depend on its neighbours.
SAME_SHAPES = frozenset({"aspect_ratio_mask"})

# Families whose vision inputs cannot be joined row by row: zero-padding is not what their own batching does.
UNJOINABLE = {"phi4_multimodal": "its image_attention_mask is padded with other values than zero"}


class NoVideos(BaseVideoProcessor, PushToHubMixin):
    """Stands where a processor insists on a video processor and torchvision, which videos need, is not installed.

    It keeps the settings of the processor it stands for, and saves them again untouched.
    """

    _auto_class = None

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.merge_size = settings.get("merge_size", 2)
        self.temporal_patch_size = settings.get("temporal_patch_size", 2)
        self.num_frames, self.fps = settings.get("num_frames"), settings.get("fps")  # SmolVLM2 reads them for any chat

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("videos are not supported here: the video processor needs torchvision")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)
