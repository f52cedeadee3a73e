"""Which form serves a call, and why the kernels do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fast_transformers import ops
from fast_transformers.feature_maps import Favor, features_of
from fast_transformers.feature_maps.base import relu_feature_map
from fast_transformers.ops import Features, choose

BFLOAT16 = {"dtype": torch.bfloat16}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({}, None),
        (BFLOAT16 | {"dims": (128, 128), "features": features_of(Favor(128, n_dims=512))}, None),
        ({"features": Features(lambda x: x)}, None),
        ({"dtype": torch.float64}, "kernels sum in float32, the inputs are float64"),
        ({"dtype": None}, "queries, keys and values differ in dtype"),
        (BFLOAT16 | {"dims": (256, 256), "features": features_of(Favor(256, n_dims=512))}, None),
        (
            BFLOAT16 | {"dims": (8, 257)},
            "kernels take values of 256 dimensions, these have 257",
        ),
        (
            BFLOAT16 | {"dims": (8, 129), "features": features_of(relu_feature_map(8))},
            "kernels take values of 128 dimensions for relu, whose factors are float32, "
            "these have 129",
        ),
        (
            {"dims": (8, 129)},
            "kernels take values of 128 dimensions in float32, these have 129",
        ),
        ({"dims": (513, 8)}, "kernels take 512 features, there are 513"),
        (
            {"dims": (129, 8), "features": features_of(Favor(129, n_dims=8))},
            "kernels take queries of 128 dimensions in float32, these have 129",
        ),
        ({"device": "cpu"}, "the tensors are on a device of type cpu, kernels need cuda"),
        ({"missing": "Triton is not installed"}, "Triton is not installed"),
        ({"unsound": "its assembler is wrong"}, "its assembler is wrong"),
        (
            {"unsound": "its assembler is wrong", "device": "cpu"},
            "the tensors are on a device of type cpu, kernels need cuda",
        ),
        (
            {"gpu": SimpleNamespace(major=7, minor=5)},
            "the GPU has compute capability 7.5, kernels are sized for 9.0 (Hopper)",
        ),
        ({"gpu": None}, "there is no CUDA device"),
        ({"exporting": True}, "an exported program is made of ordinary operations"),
    ],
)
def test_why_there_are_no_kernels(monkeypatch, call, reason) -> None:
    """As if there were a GPU; "auto" and the explanation follow from the reason."""
    call = {"causal": True, "length": 10, "keys": 10, "device": "cuda", **call}
    gpu = call.pop("gpu", SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(choose, "UNFIT", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(choose, "INTERPRETED", False)
    monkeypatch.setattr(choose, "MISSING", call.pop("missing", None))
    monkeypatch.setattr(choose, "UNSOUND", call.pop("unsound", None))
    exporting = call.pop("exporting", False)
    monkeypatch.setattr(choose, "exporting", lambda: exporting)
    assert ops.why_not("triton", **call) == reason
    answer = ops.explain(**call)
    (chosen,) = (form for form, text in answer.items() if text.startswith("chosen"))
    assert chosen == ("triton" if reason is None else "exported" if exporting else "chunked")
    if reason is not None:
        assert answer["triton"] == f"no: {reason}"
    elif "features" in call and call["features"].formula is None:
        assert answer["triton"].startswith("chosen: kernels over features computed by torch")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.6.0", None),
        ("3.4.0+git1", None),
        ("3.3.1", "Triton 3.3.1 is too old, kernels need 3.4"),
    ],
)
def test_triton_is_looked_for_and_not_imported(monkeypatch, version, reason) -> None:
    found = {"triton", "fast_transformers.ops.triton"}
    monkeypatch.setattr(choose, "find_spec", lambda name: name if name in found else None)
    monkeypatch.setattr(choose.metadata, "version", lambda name: version)
    assert choose._missing() == reason
    found.remove("triton")
    assert choose._missing() == "Triton is not installed"
    found.clear()
    assert choose._missing() == "this installation comes without the kernels"


@pytest.mark.parametrize(
    ("version", "path", "sound"),
    [("3.6.0", None, True), ("3.5.1", None, False), ("3.5.1", "/usr/local/cuda/bin/ptxas", True)],
)
def test_older_triton_needs_another_assembler(monkeypatch, version, path, sound) -> None:
    monkeypatch.setattr(choose.metadata, "version", lambda name: version)
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    if path is not None:
        monkeypatch.setenv("TRITON_PTXAS_PATH", path)
    reason = choose._unsound()
    assert (reason is None) == sound
    if reason is not None:
        assert "Triton 3.5.1 gets kernels wrong; install Triton 3.6, or set TRITON_PTXAS" in reason
