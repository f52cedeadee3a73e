"""Models of this package for Hugging Face transformers; needs the extra "hf"."""

from importlib.util import find_spec as _find_spec

if _find_spec("transformers") is None:
    raise ImportError(
        "fast_transformers.hf needs the package transformers; pip install fast-transformers[hf]"
    )

from transformers import AutoConfig, AutoModelForCausalLM

from ..specs import parse_feature_map, register_feature_map
from .configuration import FastTransformerConfig
from .modeling import FastTransformerForCausalLM
from .state import RecurrentState

AutoConfig.register(FastTransformerConfig.model_type, FastTransformerConfig, exist_ok=True)
AutoModelForCausalLM.register(FastTransformerConfig, FastTransformerForCausalLM, exist_ok=True)

__all__ = [
    "FastTransformerConfig",
    "FastTransformerForCausalLM",
    "RecurrentState",
    "parse_feature_map",
    "register_feature_map",
]
