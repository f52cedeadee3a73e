from __future__ import annotations

import re
import sys

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.weight_mapper import (
    HugginfaceBertEncoderMapper,
    IdentityRule,
    LongformerMapper,
    MappingRule,
    NotRule,
    OrRule,
    PytorchAttentionWeightsRule,
    PytorchMapper,
    RegexRule,
    SimpleMapper,
)

X = torch.arange(6.0)
BERT = {
    "layer.10.attention.self.query.weight": "layers.10.attention.query_projection.weight",
    "layer.10.attention.self.value.bias": "layers.10.attention.value_projection.bias",
    "layer.0.attention.output.dense.weight": "layers.0.attention.out_projection.weight",
    "layer.0.attention.output.LayerNorm.weight": "layers.0.norm1.weight",
    "layer.0.intermediate.dense.bias": "layers.0.linear1.bias",
    "layer.0.output.dense.bias": "layers.0.linear2.bias",
    "layer.0.output.LayerNorm.bias": "layers.0.norm2.bias",
    "pooler.weight": "pooler.weight",
}


def test_rules():
    rename = RegexRule("^a", "b")
    assert rename.matches("a.a")
    assert not rename.matches("b.a")
    assert rename.apply("a.a", X) == [("b.a", X)]
    assert RegexRule(re.compile("A", re.I), "c").apply("a", X) == [("c", X)]
    assert IdentityRule().apply("x", X) == [("x", X)]
    assert NotRule(rename).matches("b")
    assert not NotRule(rename).matches("a")
    assert NotRule(rename).apply("b", X) == [("b", X)]
    with pytest.raises(NotImplementedError):
        MappingRule().matches("a")


def test_or_rule_applies_the_first_that_matches():
    rule = OrRule(RegexRule("^a", "b"), RegexRule("c", "d"))
    assert rule.apply("ac", X) == [("bc", X)]
    assert rule.apply("c", X) == [("d", X)]
    assert rule.matches("c")
    assert not rule.matches("e")


def test_attention_weights_are_split():
    rule = PytorchAttentionWeightsRule()
    assert not rule.matches("self_attn.out_proj.weight")
    entries = rule.apply("layers.0.self_attn.in_proj_bias", X)
    assert [key for key, _ in entries] == [
        f"layers.0.attention.{name}_projection.bias" for name in ("query", "key", "value")
    ]
    assert_close(torch.cat([value for _, value in entries]), X)


def test_simple_mapper():
    state = {"a": X, "c": X}
    rename = RegexRule("a", "b")
    assert list(SimpleMapper([rename]).map(state)) == ["b", "c"]
    assert list(SimpleMapper([rename], add_identity=False).map(state)) == ["b"]
    assert list(SimpleMapper().map(state)) == ["a", "c"]
    assert list(state) == ["a", "c"]


@pytest.mark.parametrize("mapper", [SimpleMapper, HugginfaceBertEncoderMapper, LongformerMapper])
def test_constructing_leaves_no_trace(mapper):
    first = mapper()
    count = len(first.rules)
    first.rules.append(IdentityRule())
    assert len(mapper().rules) == count
    assert len(HugginfaceBertEncoderMapper.RULES) == 6


def test_pytorch_mapper():
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8)
    state = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).state_dict()
    state["layers.0.self_attn.softmax_temp"] = X
    mapped = PytorchMapper().map(state)
    parts = [f"attention.{name}_projection" for name in ("query", "key", "value", "out")]
    parts += ["linear1", "linear2", "norm1", "norm2"]
    assert set(mapped) == {
        f"layers.{i}.{part}.{kind}"
        for i in (0, 1)
        for part in parts
        for kind in ("weight", "bias")
    }
    in_proj = state["layers.1.self_attn.in_proj_weight"]
    assert_close(mapped["layers.1.attention.key_projection.weight"], in_proj[4:8])


def test_bert_mapper():
    assert list(HugginfaceBertEncoderMapper().map(dict.fromkeys(BERT, X))) == list(BERT.values())


def test_longformer_mapper_drops_global_projections():
    global_keys = [f"layer.0.attention.self.{name}_global.weight" for name in ("query", "value")]
    mapped = LongformerMapper().map(dict.fromkeys([*BERT, *global_keys], X))
    assert list(mapped) == list(BERT.values())


def test_load_file(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3, "model": {"layer.0.output.dense.bias": X}}, path)
    mapped = HugginfaceBertEncoderMapper.load_file(path, model_root="model", map_location="meta")
    assert list(mapped) == ["layers.0.linear2.bias"]
    assert mapped["layers.0.linear2.bias"].device.type == "meta"
    with pytest.raises(KeyError, match=r"got 'encoder'; it has 'epoch', 'model'"):
        SimpleMapper.load_file(str(path), model_root="encoder")


def test_load_file_runs_no_code_unless_asked_to(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.nn.Linear(1, 1)}, path)
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        SimpleMapper.load_file(path)
    with pytest.warns(UserWarning, match="can run any code"):
        assert list(SimpleMapper.load_file(path, weights_only=False)) == ["a"]


def test_load_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    pytest.importorskip("safetensors.torch").save_file({"layer.0.output.dense.bias": X}, path)
    mapped = HugginfaceBertEncoderMapper.load_file(path, map_location=torch.device("cpu"))
    assert_close(mapped, {"layers.0.linear2.bias": X})
    with pytest.raises(TypeError, match=r"mmap: arguments of torch\.load"):
        SimpleMapper.load_file(path, mmap=True)
    with pytest.raises(TypeError, match="map_location must be a device"):
        SimpleMapper.load_file(path, map_location={"cuda:0": "cpu"})
    with pytest.raises(KeyError, match=r"it has 'layer\.0\.output\.dense\.bias'"):
        SimpleMapper.load_file(path, model_root="model")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        SimpleMapper.load_file(path)
