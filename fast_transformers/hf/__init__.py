"""Models of this package for Hugging Face transformers; needs the extra "hf"."""

from importlib.util import find_spec as _find_spec

if _find_spec("transformers") is None:
    raise ImportError(
        "fast_transformers.hf needs the package transformers; pip install fast-transformers[hf]"
    )

from transformers import __version__ as _found

if not (5, 4) <= tuple(map(int, _found.split(".")[:2])) < (6,):  # interfaces change between
    raise ImportError(
        f"fast_transformers.hf works with transformers>=5.4,<6, found {_found}; "
        "pip install 'transformers>=5.4,<6'"
    )

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from ..specs import parse_feature_map, register_feature_map
from .cache import StateCache
from .configuration import FastTransformerConfig
from .encoders import FastTransformerForMaskedLM, FastTransformerModel
from .interface import attention_implementation, register_all
from .modeling import FastTransformerForCausalLM
from .owned import load_feature_maps
from .seq2seq import FastTransformerForSeq2SeqLM
from .state import RecurrentState

AutoConfig.register(FastTransformerConfig.model_type, FastTransformerConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, FastTransformerModel),
    (AutoModelForCausalLM, FastTransformerForCausalLM),
    (AutoModelForMaskedLM, FastTransformerForMaskedLM),
    (AutoModelForSeq2SeqLM, FastTransformerForSeq2SeqLM),
):
    _auto.register(FastTransformerConfig, _model, exist_ok=True)
register_all()

__all__ = [
    "FastTransformerConfig",
    "FastTransformerForCausalLM",
    "FastTransformerForMaskedLM",
    "FastTransformerForSeq2SeqLM",
    "FastTransformerModel",
    "RecurrentState",
    "StateCache",
    "attention_implementation",
    "load_feature_maps",
    "parse_feature_map",
    "register_feature_map",
]
