"""Every map by its name, in builders and on the command line, with its paper in its docstring."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from fast_transformers import feature_maps
from fast_transformers.builders import RecurrentEncoderBuilder, TransformerEncoderBuilder
from fast_transformers.cli import main
from fast_transformers.feature_maps import PROJECTIONS, FeatureMap, RandomFeatureMap
from fast_transformers.masking import TriangularCausalMask
from fast_transformers.specs import FEATURE_MAPS, parse_feature_map
from fast_transformers.utils import make_mirror

NEEDED = {
    "concat": "concat:inners=[relu, 'favor:n_dims=8']",
    "smoothed-rff": "smoothed-rff:n_dims=9",
}
SPECS = [NEEDED.get(name, name) for name in FEATURE_MAPS]
OURS = {"Centered", "Concat", "SmoothedRandomFourierFeatures"}  # made here, or before us
CLASSES = {
    name: value
    for name, value in vars(feature_maps).items()
    if isinstance(value, type)
    and issubclass(value, FeatureMap)
    and value not in (FeatureMap, RandomFeatureMap)
}


@pytest.mark.parametrize("spec", SPECS)
def test_builders_take_every_name(spec: str) -> None:
    options = {
        "attention_type": "causal-linear",
        "n_layers": 1,
        "n_heads": 2,
        "query_dimensions": 8,
        "value_dimensions": 8,
        "feed_forward_dimensions": 16,
        "feature_map": parse_feature_map(spec),
    }
    model = TransformerEncoderBuilder.from_kwargs(**options).get().eval()
    rnn = RecurrentEncoderBuilder.from_kwargs(**options).get().eval()
    make_mirror(model, rnn)
    x, state = torch.randn(2, 5, 16), None
    whole = model(x, attn_mask=TriangularCausalMask(5))
    for i in range(5):
        y, state = rnn(x[:, i], state)
    torch.testing.assert_close(y, whole[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_the_command_line_knows_every_name(spec: str, capsys) -> None:
    assert main(["info", "--feature-map", spec]) == 0
    features = parse_feature_map(spec)(64).feature_dims
    assert str(features) in capsys.readouterr().out


def test_every_class_has_a_name() -> None:
    made = {type(parse_feature_map(spec)(8)) for spec in SPECS}
    assert {*CLASSES.values()} <= made


@pytest.mark.parametrize("name", CLASSES)
def test_a_docstring_names_the_paper_and_the_place(name: str) -> None:
    text = " ".join((inspect.getdoc(CLASSES[name]) or "").split())
    place = re.search(
        r"(equations?|lemma|theorem|algorithm|section) \d|its \S+ (matching|re-)", text
    )
    paper = re.search(r"arXiv:\d{4}\.\d{5}|\b(19|20)\d\d\b", text)
    assert name in OURS or (place or name == "ActivationFunctionFeatureMap")
    assert name in OURS or paper


@pytest.mark.parametrize("name", sorted(set(PROJECTIONS) - {"antithetic", "qmc"}))
def test_a_projection_names_its_place(name: str) -> None:
    text = " ".join((inspect.getdoc(PROJECTIONS[name]) or "").split())
    assert re.search(r"(equation|theorem|algorithm|section) \d", text)
