"""Everything that is documented, and everything that code for the older library imports."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from torch import nn

PATHS = {
    "fast_transformers": "__version__ __author__ __license__",
    "fast_transformers.attention": (
        "AttentionLayer FullAttention LinearAttention CausalLinearAttention "
        "ConditionalFullAttention"
    ),
    "fast_transformers.attention.attention_layer": "AttentionLayer",
    "fast_transformers.attention.full_attention": "FullAttention",
    "fast_transformers.attention.linear_attention": "LinearAttention",
    "fast_transformers.attention.causal_linear_attention": "CausalLinearAttention causal_linear",
    "fast_transformers.attention.conditional_full_attention": "ConditionalFullAttention",
    "fast_transformers.attention_registry": (
        "AttentionRegistry RecurrentAttentionRegistry RecurrentCrossAttentionRegistry Spec Choice "
        "Optional Int Float Bool Callable EventDispatcherInstance"
    ),
    "fast_transformers.attention_registry.registry": "Registry",
    "fast_transformers.attention_registry.spec": "Spec Choice Optional Int Float Bool Callable",
    "fast_transformers.builders": (
        "AttentionBuilder RecurrentAttentionBuilder RecurrentCrossAttentionBuilder "
        "TransformerEncoderBuilder RecurrentEncoderBuilder TransformerDecoderBuilder "
        "RecurrentDecoderBuilder"
    ),
    "fast_transformers.builders.base": "BaseBuilder",
    "fast_transformers.builders.attention_builders": (
        "BaseAttentionBuilder AttentionBuilder RecurrentAttentionBuilder "
        "RecurrentCrossAttentionBuilder"
    ),
    "fast_transformers.builders.transformer_builders": (
        "BaseTransformerBuilder BaseTransformerEncoderBuilder BaseTransformerDecoderBuilder "
        "TransformerEncoderBuilder RecurrentEncoderBuilder TransformerDecoderBuilder "
        "RecurrentDecoderBuilder"
    ),
    "fast_transformers.causal_product": "CausalDotProduct causal_dot_product",
    "fast_transformers.diagnostics": (
        "attention_map attention_report kernel_report scale_report suggest capture capacity fit "
        "AttentionReport Capture CapacityReport KernelReport Measures Sample ScaleReport "
        "Suggestion make_sample"
    ),
    "fast_transformers.events": (
        "Event AttentionEvent QKVEvent IntermediateOutput EventDispatcher"
    ),
    "fast_transformers.events.event": "Event AttentionEvent QKVEvent IntermediateOutput",
    "fast_transformers.events.event_dispatcher": "EventDispatcher",
    "fast_transformers.events.filters": (
        "EventFilter CallableEventFilter LayerNameEventFilter event_class from_layer "
        "layer_name_contains"
    ),
    "fast_transformers.feature_maps": (
        "FeatureMap ActivationFunctionFeatureMap elu_feature_map RandomFourierFeatures "
        "SmoothedRandomFourierFeatures Favor GeneralizedRandomFeatures OptimalPositiveFeatures "
        "DenseExponentialFeatures PolySketch ExponentialFeatureMap LogNormal DPFP "
        "TaylorFeatureMap PolynomialFeatureMap ReBased T2R Hedgehog Centered Concat CosReweight "
        "Normalized Projected Moments PROJECTIONS"
    ),
    "fast_transformers.feature_maps.base": (
        "FeatureMap ActivationFunctionFeatureMap elu_feature_map"
    ),
    "fast_transformers.feature_maps.fourier_features": (
        "RandomFourierFeatures SmoothedRandomFourierFeatures Favor GeneralizedRandomFeatures "
        "orthogonal_random_matrix_"
    ),
    "fast_transformers.masking": "BaseMask FullMask LengthMask TriangularCausalMask",
    "fast_transformers.ops": (
        "linear_attention causal_linear_attention linear_attention_step LinearState Attended "
        "Features Composition Formula explain why_not FORMS register_elementwise"
    ),
    "fast_transformers.recurrent.attention": (
        "RecurrentAttentionLayer RecurrentFullAttention RecurrentLinearAttention "
        "RecurrentConditionalFullAttention RecurrentCrossAttentionLayer "
        "RecurrentCrossFullAttention RecurrentCrossLinearAttention "
        "RecurrentCrossConditionalFullAttention"
    ),
    "fast_transformers.recurrent.attention.self_attention": (
        "RecurrentAttentionLayer RecurrentFullAttention RecurrentLinearAttention "
        "RecurrentConditionalFullAttention"
    ),
    "fast_transformers.recurrent.attention.self_attention.attention_layer": (
        "RecurrentAttentionLayer"
    ),
    "fast_transformers.recurrent.attention.self_attention.full_attention": (
        "RecurrentFullAttention"
    ),
    "fast_transformers.recurrent.attention.self_attention.linear_attention": (
        "RecurrentLinearAttention"
    ),
    "fast_transformers.recurrent.attention.cross_attention": (
        "RecurrentCrossAttentionLayer RecurrentCrossFullAttention RecurrentCrossLinearAttention "
        "RecurrentCrossConditionalFullAttention"
    ),
    "fast_transformers.recurrent.attention.cross_attention.attention_layer": (
        "RecurrentCrossAttentionLayer"
    ),
    "fast_transformers.recurrent.attention.cross_attention.full_attention": (
        "RecurrentCrossFullAttention"
    ),
    "fast_transformers.recurrent.attention.cross_attention.linear_attention": (
        "RecurrentCrossLinearAttention"
    ),
    "fast_transformers.recurrent.transformers": (
        "RecurrentTransformerEncoder RecurrentTransformerEncoderLayer "
        "RecurrentTransformerDecoder RecurrentTransformerDecoderLayer"
    ),
    "fast_transformers.recurrent._utils": "check_state",
    "fast_transformers.rotary": "RotaryEmbedding",
    "fast_transformers.state": (
        "State KeysValues Memory PositionState ConditionalState CrossConditionalState "
        "CrossLinearState open_state"
    ),
    "fast_transformers.stepper": "Stepper why_not_graph",
    "fast_transformers.testing": "check_feature_map",
    "fast_transformers.transformers": (
        "TransformerEncoder TransformerEncoderLayer TransformerDecoder TransformerDecoderLayer"
    ),
    "fast_transformers.utils": "make_mirror",
    "fast_transformers.weight_mapper": (
        "MappingRule IdentityRule NotRule OrRule RegexRule PytorchAttentionWeightsRule "
        "SimpleMapper PytorchMapper HugginfaceBertEncoderMapper LongformerMapper"
    ),
}


@pytest.mark.parametrize("module", PATHS)
def test_importable(module: str) -> None:
    found: Any = importlib.import_module(module)
    missing = [name for name in PATHS[module].split() if not hasattr(found, name)]
    assert not missing


@pytest.mark.parametrize(
    "module", [m for m in PATHS if hasattr(importlib.import_module(m), "__all__")]
)
def test_listed(module: str) -> None:
    """What a package exports is in the list above."""
    exported = set(importlib.import_module(module).__all__)
    extra = exported - set(PATHS[module].split())
    assert extra <= {
        *("RandomFeatureMap", "build_feature_map", "draw", "features_of"),
        *("with_positions", "orthogonal_random_matrix_", "Registry"),
    }


def test_what_comes_later_says_so() -> None:
    attention = importlib.import_module("fast_transformers.attention")
    with pytest.raises(AttributeError, match=r"LocalAttention is not in this version; use"):
        _ = attention.LocalAttention
    with pytest.raises(ImportError):
        exec("from fast_transformers.attention import ReformerAttention")


def test_the_package_is_typed() -> None:
    package = importlib.import_module("fast_transformers")
    assert (Path(str(package.__file__)).parent / "py.typed").is_file()


def test_modules_are_modules() -> None:
    for module in ("attention", "recurrent.attention", "transformers", "recurrent.transformers"):
        for name in PATHS[f"fast_transformers.{module}"].split():
            cls = getattr(importlib.import_module(f"fast_transformers.{module}"), name)
            assert issubclass(cls, nn.Module)
