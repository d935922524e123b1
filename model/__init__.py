"""The network and its processor: nothing here knows of shards or stages.

`save_pretrained` copies these files beside the weights, so that a checkpoint loads where this repository is not
(`trust_remote_code=True`): each imports its neighbours by `from .name import ...` only, which is what the library
follows.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from .configuration_foveated_vlm import FoveatedVLMConfig
from .modeling_foveated_vlm import FoveatedVLMForConditionalGeneration, FoveatedVLMOutput
from .processing_foveated_vlm import FoveatedVLMProcessor

AutoConfig.register(FoveatedVLMConfig.model_type, FoveatedVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FoveatedVLMConfig, FoveatedVLMProcessor, exist_ok=True)
FoveatedVLMConfig.register_for_auto_class()
FoveatedVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
FoveatedVLMProcessor.register_for_auto_class()

__all__ = ["FoveatedVLMConfig", "FoveatedVLMForConditionalGeneration", "FoveatedVLMOutput", "FoveatedVLMProcessor"]
