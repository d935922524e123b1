"""Registers the classes of this package with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # without torchvision

from .configuration_foveated_vlm import FoveatedVLMConfig
from .image_processing_foveated_vlm import FoveatedVLMImageProcessor
from .modeling_foveated_vlm import FoveatedVLMForConditionalGeneration
from .processing_foveated_vlm import FoveatedVLMProcessor

AutoConfig.register(FoveatedVLMConfig.model_type, FoveatedVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(FoveatedVLMConfig, FoveatedVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(FoveatedVLMConfig, FoveatedVLMProcessor, exist_ok=True)
AutoImageProcessor.register(FoveatedVLMConfig, FoveatedVLMImageProcessor, exist_ok=True)
FoveatedVLMConfig.register_for_auto_class()
FoveatedVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
FoveatedVLMProcessor.register_for_auto_class()
