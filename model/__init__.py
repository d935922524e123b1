"""The network: nothing here knows of files, shards or stages."""

from transformers import AutoConfig, AutoModelForImageTextToText

from .configuration_foveated_vlm import FoveatedVLMConfig
from .modeling_foveated_vlm import FoveatedVLMForConditionalGeneration, FoveatedVLMOutput

AutoConfig.register(FoveatedVLMConfig.model_type, FoveatedVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, exist_ok=True)

__all__ = ["FoveatedVLMConfig", "FoveatedVLMForConditionalGeneration", "FoveatedVLMOutput"]
