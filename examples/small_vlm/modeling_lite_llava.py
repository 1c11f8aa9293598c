"""LLaVA whose eyes are a convolutional network: EfficientNet's last feature map, read as a sequence of image tokens."""

from typing import Any

from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel


class LiteLlavaConfig(LlavaConfig):
    model_type = "lite_llava"


class LiteLlavaModel(LlavaModel):
    config_class = LiteLlavaConfig

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """(N, 3, S, S) pixels to N entries of ((S / 32)^2, H) features."""
        tokens = self.vision_tower(pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=list(self.multi_modal_projector(tokens))
        )

    def train(self, mode: bool = True) -> "LiteLlavaModel":
        """The tower never trains: its batch statistics are those of ImageNet."""
        super().train(mode)
        self.vision_tower.eval()
        return self


class LiteLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    config_class = LiteLlavaConfig

    def __init__(self, config: LiteLlavaConfig) -> None:
        super().__init__(config)
        self.model = LiteLlavaModel(config)
        self.post_init()
