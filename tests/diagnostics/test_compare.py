"""The command ``compare``, its plots and its page."""

from __future__ import annotations

import base64
import re

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

from safetensors.torch import save_file

from fast_transformers.cli import main
from fast_transformers.diagnostics import attention_report, capacity
from fast_transformers.diagnostics.comparison import Comparison
from fast_transformers.diagnostics.curves import (
    kernel_curves,
    variance_curves,
    with_size,
    without_size,
)
from fast_transformers.diagnostics.page import Section, page
from fast_transformers.diagnostics.plots import error_plot, palette
from fast_transformers.diagnostics.sources import from_file, synthetic
from fast_transformers.masking import TriangularCausalMask

PICTURES = {"matrices", "kl-over-features", "frobenius-over-features", "kernel", "capacity"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fast_transformers.diagnostics.comparison.SIZES", (16, 32))


def run(capsys, *args):
    status = main(["compare", *map(str, args)])
    return status, *capsys.readouterr()


SMALL = ("--length", 24, "--dims", 8, "--heads", 1, "--draws", 1)


def check_folder(folder, maps):
    names = {path.stem for path in folder.glob("*.png")}
    assert names >= PICTURES
    for path in folder.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 4000
    text = (folder / "index.html").read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    files = {path.read_bytes() for path in folder.glob("*.png")}
    assert len(embedded) == len(files)
    assert {base64.b64decode(data)[:8] for data in embedded} == {b"\x89PNG\r\n\x1a\n"}
    assert "http" not in text  # nothing is loaded from elsewhere
    assert "<script" not in text
    for name in maps:
        assert f"<td>{name}</td>" in text


def test_synthetic(capsys, tmp_path) -> None:
    maps = ["elu", "favor:n_dims=16"]
    flags = [part for name in maps for part in ("--feature-map", name)]
    status, out, err = run(capsys, *SMALL, *flags)
    assert status == 0, err
    check_folder(tmp_path / "compare", maps)
    assert "exact softmax" in out
    assert "uniform" in out
    assert "wrote compare/index.html" in out
    assert err == ""  # no bar without a terminal


def test_a_file(capsys, tmp_path) -> None:
    q, k = torch.randn(2, 4, 12, 2, 8, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    save_file({"q": q, "k": k.contiguous(), "keep": keep}, "qk.safetensors")
    source = from_file(tmp_path / "qk.safetensors")
    sample, examples = source.samples["qk"], source.examples["qk"]
    assert torch.equal(sample.q, q[:2])
    assert torch.equal(examples.k, k[2:])
    assert torch.equal(sample.shown()[0, 0], keep[0, 0])
    status, _, err = run(
        capsys, "qk.safetensors", "--feature-map", "relu", "--feature-map", "generalized:n_dims=16"
    )
    assert status == 0, err
    check_folder(tmp_path / "compare", ["relu", "generalized:n_dims=16"])


def test_the_suggestion_sees_what_the_queries_see() -> None:
    """The mask and the temperature of the source, and its examples."""
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    source = synthetic(dims=8, length=12, heads=1)
    samples = {
        name: s._replace(keep=causal, softmax_temp=0.1) for name, s in source.samples.items()
    }
    masked = Comparison(source._replace(samples=samples), ["elu"], draws=1)
    (found,) = masked._suggestion().reports
    q, k, *_ = samples["synthetic"]
    mask = TriangularCausalMask(12)
    expected = attention_report("elu", q, k, attn_mask=mask, softmax_temp=0.1)
    (elu,) = (trial for trial in found.trials if trial.spec == "elu")
    assert elu.error == pytest.approx(float(expected["elu"].frobenius), rel=1e-5)
    assert found.uniform == pytest.approx(float(expected["uniform"].frobenius), rel=1e-5)
    assert found.uniform_kl == pytest.approx(float(expected["uniform"].kl), rel=1e-5)
    assert [row[0] for row in found.cells()[1][:2]] == ["exact softmax", "uniform"]


def test_a_file_calibrated_on_another(capsys, tmp_path) -> None:
    x = torch.randn(4, 2, 12, 1, 8, generator=torch.Generator().manual_seed(0))
    save_file({"q": x[0].clone(), "k": x[1].clone()}, "one.safetensors")
    save_file({"q": x[2].clone(), "k": x[3].clone()}, "other.safetensors")
    source = from_file(tmp_path / "one.safetensors", tmp_path / "other.safetensors")
    assert source.separate
    assert torch.equal(source.samples["one"].q, x[0])  # the whole file is measured
    assert torch.equal(source.examples["one"].k, x[3])
    spec = "centered:inner='derf:n_dims=16'"
    status, out, err = run(
        capsys, "one.safetensors", "--calibrate-on", "other.safetensors", "--fit", 2, "--draws", 1,
        "--feature-map", spec, "--feature-map", "elu",
    )  # fmt: skip
    assert status == 0, err
    assert f"\n{spec}, fitted " in out
    assert "\nelu, fitted" not in out
    text = (tmp_path / "compare" / "index.html").read_text()
    assert "maps calibrated on other.safetensors: 2 of 2 sequences" in text
    assert "in 2 steps of gradient descent, on other inputs than those measured" in text


def test_a_single_sequence_is_said_to_be_both(capsys, tmp_path) -> None:
    x = torch.randn(2, 1, 12, 1, 8, generator=torch.Generator().manual_seed(0))
    save_file({"q": x[0].clone(), "k": x[1].clone()}, "one.safetensors")
    assert not from_file(tmp_path / "one.safetensors").separate
    status, _, err = run(capsys, "one.safetensors", "--draws", 1, "--feature-map", "elu")
    assert status == 0, err
    text = (tmp_path / "compare" / "index.html").read_text()
    assert "on the very inputs that were measured" in text


def test_a_run(capsys, tmp_path) -> None:
    pytest.importorskip("transformers")
    from fast_transformers.hf.recipe import make_recipe
    from fast_transformers.hf.training import train

    recipe = make_recipe(
        "copy", length=13, batch_size=400, layers=2, heads=2, dim=16, feed_forward=16, epochs=1,
        device="cpu", feature_map="favor:n_dims=8",
    )  # fmt: skip
    train(recipe, tmp_path / "run", bar=False)
    capsys.readouterr()
    status, out, err = run(
        capsys, "run", "--feature-map", "elu", "--feature-map", "favor:n_dims=16", "--draws", 1
    )
    assert status == 0, err
    check_folder(tmp_path / "compare", ["elu", "the model&#x27;s own"])
    assert "encoder.layers.1.attention" in out
    flags = ("--feature-map", "favor:n_dims=16", "--draws", 1)
    status, out, err = run(capsys, "run", "--calibrate-on", "copy", *flags)
    assert status == 0, err
    assert "maps calibrated on sequences of copy" in (tmp_path / "compare/index.html").read_text()
    status, out, err = run(capsys, "run", "--calibrate-on", "mqar", *flags)
    assert (status, out) == (2, "")
    assert "--calibrate-on mqar has 64 tokens, the model in run 12" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--feature-map", "elo"], "unknown feature map 'elo'; did you mean 'elu'?"),
        (["nowhere.safetensors"], "no such file"),
        (["bad.safetensors"], "is no safetensors file"),
        (["other.safetensors"], "must hold q and k"),
        (["shape.safetensors"], "must agree in N and E"),
        (["nan.safetensors"], "must be finite"),
        (["."], "holds no trained model"),
        (["nowhere.safetensors", "--dims", "8"], "--dims is for synthetic inputs alone"),
        (["--calibrate-on", "x"], "--calibrate-on is for files and runs"),
        (["nan.safetensors", "--calibrate-on", "nan.safetensors"], "calibrate on another file"),
        (["fine.safetensors", "--calibrate-on", "less.safetensors"], "got (1, 2)"),
        (["--logit-std", "nan"], "logit_std must be above 0"),
        (["--length", "99999"], "length from 2 to 1024"),
    ],
)
def test_mistakes(capsys, tmp_path, args, message) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    x = torch.zeros(1, 3, 1, 4)
    save_file({"q": x, "w": x + 1}, "other.safetensors")
    save_file({"q": x, "k": torch.zeros(1, 3, 1, 5)}, "shape.safetensors")
    save_file({"q": x, "k": x * torch.nan}, "nan.safetensors")
    save_file({"q": x, "k": x + 1}, "fine.safetensors")
    save_file({"q": x[..., :2].clone(), "k": x[..., 2:].clone()}, "less.safetensors")
    status, out, err = run(capsys, *args)
    assert (status, out) == (2, "")
    assert message in err


def test_the_page_escapes_what_it_is_given() -> None:
    evil = '<img src=x onerror="alert(1)">'
    q, k = torch.randn(2, 1, 8, 1, 4)
    report = attention_report({evil: "elu"}, q, k)
    text = page(evil, evil, [Section(evil, evil, [report])])
    assert "<img" not in text
    assert text.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;") == 6


def test_sizes_in_specs() -> None:
    spec = "centered:inner='derf:n_dims=64, mode=sderf'"
    assert with_size(spec, 8) == "centered:inner='derf:n_dims=8, mode=sderf'"
    assert without_size(spec) == "centered:inner='derf:mode=sderf'"
    assert without_size("favor:projection=iid, n_dims=3") == "favor:projection=iid"
    assert palette(["favor:n_dims=8", "favor:n_dims=16", "elu"]).keys() == {"favor", "elu"}


def test_variance_follows_the_closed_form() -> None:
    q, k = synthetic(dims=16, length=32, logit_std=0.1).samples["synthetic"][:2]
    (curve,) = variance_curves(["favor:n_dims=8, projection=iid"], q, k, (16, 64)).values()
    assert curve.measured == pytest.approx(curve.predicted, rel=0.25)
    assert curve.measured[0] == pytest.approx(4 * curve.measured[1], rel=0.3)


def test_kernel_curves() -> None:
    """The exact kernel of the Taylor series, and one that is exp on average."""
    curves = kernel_curves(["taylor", "rff:n_dims=64"], 16, norm=1.0, pairs=64, draws=32)
    z = curves["taylor"].z
    series = 1 + z + z.square() / 2
    series = series * (series * z.exp()).sum() / series.square().sum()
    torch.testing.assert_close(curves["taylor"].mean, series, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(curves["rff:n_dims=64"].mean, z.exp(), rtol=0.05, atol=0.05)


def test_plots_stand_alone() -> None:
    """Without colours of their own, and with a dollar in a name, which starts a formula."""
    from fast_transformers.diagnostics.plots import capacity_plot

    sample = synthetic(dims=8, length=16, heads=1).samples["synthetic"]
    report = attention_report({"$a$": "elu"}, *sample[:2])
    for figure in (error_plot({}, report), capacity_plot(capacity("elu", dims=8, counts=(4, 8)))):
        figure.savefig("out.png")
