"""What feature maps inside models of transformers know is saved with the model, and loaded."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, LlamaModel

from fast_transformers.diagnostics import capture
from fast_transformers.hf import attention_implementation, load_feature_maps
from tests.hf.test_interface import bert, gpt2, llama, tokens

CENTERED = "centered:inner='derf:n_dims=16'"
SPECS = [CENTERED, "centered:inner=taylor", "hedgehog", "projected:inner='derf:n_dims=8', dim=4"]
FRESH = "runs with .* as this feature map starts: .*load_feature_maps.*calibrate"
OWN = "model.layers.0.self_attn.fast_transformers_map."


@torch.no_grad()
def output(model):
    return model(tokens())[0]


def fitted(make, spec):
    """A model whose maps know their statistics and have trained weights."""
    model = make(spec)
    found = capture(model, tokens())
    for name, own in found.own.items():
        own.calibrate(found.layers[name].q, found.layers[name].k, fit_steps=3)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and the folder that it was saved in."""
    model, folder = fitted(llama, CENTERED), tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return model, folder


def reload(folder, spec, cls=LlamaForCausalLM):
    return cls.from_pretrained(folder, attn_implementation=attention_implementation(spec))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_saved_and_loaded(make, spec, tmp_path):
    model = fitted(make, spec)
    with pytest.warns(UserWarning, match=FRESH):
        assert not torch.allclose(output(make(spec)), output(model), atol=1e-3)
    model.save_pretrained(tmp_path)
    again = reload(tmp_path, spec, type(model))
    names = load_feature_maps(again, tmp_path)
    assert len(names) == 2
    assert all(hasattr(again.get_submodule(name), "fast_transformers_map") for name in names)
    assert torch.equal(output(again), output(model))
    again.save_pretrained(tmp_path / "again")
    third = reload(tmp_path / "again", spec, type(model))
    load_feature_maps(third, tmp_path / "again")
    assert torch.equal(output(third), output(model))


def test_what_is_not_loaded_is_told(saved):
    model, folder = saved
    again = reload(folder, CENTERED)
    with pytest.warns(UserWarning, match=FRESH):
        assert not torch.allclose(output(again), output(model), atol=1e-3)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        llama(CENTERED).load_state_dict(model.state_dict())


def test_a_state_dict(saved):
    """Maps are made from it, and then a model loads it like any other."""
    model, _ = saved
    again = llama(CENTERED, initializer_range=0.1)
    load_feature_maps(again, model.state_dict())
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again), output(model))


def test_files_in_parts(saved, tmp_path):
    model, _ = saved
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = reload(tmp_path, CENTERED)
    load_feature_maps(again, tmp_path)
    assert torch.equal(output(again), output(model))


def test_with_a_head_and_without(saved, tmp_path):
    model, folder = saved
    body = reload(folder, CENTERED, LlamaModel)
    load_feature_maps(body, folder)
    assert torch.equal(output(body), output(model.model))
    body.save_pretrained(tmp_path)
    headed = reload(tmp_path, CENTERED)
    load_feature_maps(headed, tmp_path)
    assert torch.equal(output(headed.model), output(body))


def test_other_random_features_for_the_same_statistics(saved):
    model, folder = saved
    again = reload(folder, "centered:inner='derf:n_dims=64'")
    load_feature_maps(again, folder)
    before, after = (m.get_submodule(OWN + "feature_map") for m in (model, again))
    assert torch.equal(after.of_keys, before.of_keys)
    assert after.feature_dims == 64


def test_copies_and_pickles(saved, tmp_path):
    """Also in a process that knows nothing of the attention."""
    model, _ = saved
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(again), output(model))
    torch.save({"model": model, "ids": tokens(), "expected": output(model)}, tmp_path / "all.pt")
    code = f"""
        import torch
        saved = torch.load({str(tmp_path / "all.pt")!r}, weights_only=False)
        found = saved["model"](saved["ids"]).logits
        torch.testing.assert_close(found, saved["expected"])
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("spec", ["elu", "favor:n_dims=16", "polysketch:sketch=8, degree=8"])
def test_maps_that_know_nothing_leave_nothing(spec, tmp_path):
    model = llama(spec)
    expected = output(model)
    assert not any("fast_transformers" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert torch.equal(output(reload(tmp_path, spec)), expected)
    with pytest.raises(ValueError, match=r"no feature maps were saved in .*once the model has"):
        load_feature_maps(model, tmp_path)
    with pytest.raises(ValueError, match="no feature maps were saved in the state dict"):
        load_feature_maps(model, model.state_dict())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"query_dimensions": None}, "is damaged: no number of dimensions"),
        ({"query_dimensions": torch.tensor(10**12)}, "is damaged: no number of dimensions"),
        ({"query_dimensions": torch.tensor(torch.nan)}, "is damaged: no number of dimensions"),
        (
            {"query_dimensions": torch.zeros(3, dtype=torch.int64)},
            "is damaged: no number of dimensions",
        ),
        ({"query_dimensions": torch.tensor(4)}, "size mismatch"),
        ({"feature_map.of_keys": None}, "Missing key"),
        ({"feature_map.of_keys": torch.zeros(3)}, "size mismatch"),
        ({"feature_map.other": torch.zeros(3)}, "Unexpected key"),
    ],
)
def test_damaged_maps(saved, change, text, tmp_path):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    for name, value in change.items():
        tensors.pop(OWN + name, None)
        if value is not None:
            tensors[OWN + name] = value
    save_file(tensors, tmp_path / "model.safetensors")
    again = reload(folder, CENTERED)
    if text is None:
        load_feature_maps(again, tmp_path)
        return
    with pytest.raises(ValueError, match=text):
        load_feature_maps(again, tmp_path)
    assert not any("fast_transformers" in name for name in again.state_dict())


def test_clear_errors(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ValueError, match=r"is not 'centered:inner=taylor': .*Unexpected key"):
        load_feature_maps(reload(folder, "centered:inner=taylor"), folder)
    with pytest.raises(ValueError, match="got attn_implementation='sdpa'; pass what attention_im"):
        load_feature_maps(LlamaForCausalLM.from_pretrained(folder), folder)
    with pytest.raises(ValueError, match="which GPT2LMHeadModel has not; load it into the model"):
        load_feature_maps(gpt2(CENTERED), model.state_dict())
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        load_feature_maps(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(json.dumps({}).encode())
    with pytest.raises(ValueError, match=r"is damaged: .*; save the model again"):
        load_feature_maps(model, tmp_path)
