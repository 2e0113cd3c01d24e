"""The model. Importing this package makes `longllava` known to the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from .cache import LongLlavaCache
from .configuration_longllava import LongLlavaConfig
from .modeling_longllava import LongLlavaForConditionalGeneration, LongLlavaModel, LongLlavaPreTrainedModel
from .selective_scan import selective_scan, selective_scan_backend, selective_scan_ref
from .session import LongLlavaSession

AutoConfig.register("longllava", LongLlavaConfig)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto_class.register(LongLlavaConfig, LongLlavaForConditionalGeneration)

__all__ = [
    "LongLlavaCache",
    "LongLlavaConfig",
    "LongLlavaForConditionalGeneration",
    "LongLlavaModel",
    "LongLlavaPreTrainedModel",
    "LongLlavaSession",
    "selective_scan",
    "selective_scan_backend",
    "selective_scan_ref",
]
