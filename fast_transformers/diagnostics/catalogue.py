"""Every map of the library in the place of a pretrained encoder's softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from .encoder import EncoderReport, encoder_report, minilm, python_topics, windows
from .page import Section
from .sample import with_fits

TEXTS = 24  # measured; the others are what maps are calibrated on
TOKENS = 256
HEAD_DIMS = 32
CATALOGUE = (
    # one size, or the one nearest to 256 features at 32 dimensions
    "elu",
    "relu",
    "exp",
    "exp:softmax=True",
    "lln",
    "cos:inner=relu, max_length=256",
    "normalized:inner=elu, norm=l1",
    "hedgehog",
    "hedgehog:normalize=none",
    "t2r:n_dims=256",
    "dpfp:nu=4",
    "poly",
    "rebased",
    "polysketch:sketch=22",
    "taylor",
    "projected:inner=taylor, dim=21",
    # 256 random features
    "generalized:n_dims=256",
    "rff:n_dims=256",
    "smoothed-rff:n_dims=257",
    "favor:n_dims=256",
    "favor:n_dims=256, projection=simplex",
    "oprf:n_dims=256",
    "derf:n_dims=256, mode=sderf",
    "derf:n_dims=256, mode=saderf",
    "derf:n_dims=256, mode=aderf",
    "derf:n_dims=256",
    # centred
    "centered:inner=taylor",
    "projected:inner='centered:inner=taylor', dim=21",
    "centered:inner='favor:n_dims=256'",
    "centered:inner='oprf:n_dims=256'",
    "centered:inner='derf:n_dims=256, mode=sderf'",
    "centered:inner='derf:n_dims=256, mode=aderf'",
    "centered:inner='derf:n_dims=64'",
    "centered:inner='derf:n_dims=256'",
)

FITTED = (  # every map of the catalogue with something to fit, and those that are mostly trained
    *(spec for spec in CATALOGUE if spec.startswith(("lln", "t2r", "hedgehog", "rebased"))),
    *(spec for spec in CATALOGUE if spec.startswith(("oprf", "derf", "projected", "centered"))),
)

Progress = Callable[[int], AbstractContextManager[Callable[[str], object]]]


def minilm_report(
    specs: Sequence[str], *, draws: int, tokens: int, steps: int, progress: Progress
) -> EncoderReport:
    """Maps in all 72 heads of all-MiniLM-L6-v2, on pages of Python's own help.

    With ``steps`` above 0 each map that has something to fit is measured twice: as its moments
    leave it, and fitted in so many steps.

    The texts are taken in turn: those measured and those that maps are calibrated on have the
    same distribution, and none is in both.

    Raises:
        ImportError: if the encoder is not installed.
        ValueError: for fewer than 16 tokens, or more than the encoder has positions.
    """
    if not 16 <= tokens <= 512:
        raise ValueError(f"length must be from 16 to 512 tokens, got {tokens}")
    model, tokenizer = minilm()
    ids = windows(tokenizer, python_topics(), tokens)
    measured, calibration = ids[::2][:TEXTS], ids[1::2]
    maps = with_fits(specs, HEAD_DIMS, steps)
    with progress(len(maps) * 72) as tick:
        return encoder_report(
            maps, model, measured, calibration, draws=draws, tick=lambda: tick("MiniLM")
        )


def minilm_page(
    specs: Sequence[str], *, draws: int, tokens: int, steps: int, progress: Progress
) -> tuple[str, list[Section]]:
    """Title and sections of a page on :func:`minilm_report`; no specs means all maps."""
    specs = specs or (FITTED if steps else CATALOGUE)
    report = minilm_report(specs, draws=draws, tokens=tokens, steps=steps, progress=progress)
    title = (
        f"the 72 heads (32 dimensions) of all-MiniLM-L6-v2, {report.texts} texts of "
        f"{report.tokens} tokens, {report.draws} draws a head"
    )
    section = Section(
        "A pretrained encoder",
        f"Medians over the heads, on {title}; maps with statistics calibrated on "
        f"{report.calibration} other texts. of uniform: KL divergence as a share of that of "
        "uniform attention; better heads: share of heads where it is below. cosine: of a text's "
        "embedding (the mean of the last states) to the exact model's when the map is in the "
        "place of all attention at once; mean and least over the texts. "
        + (
            f"Rows that say so were fitted to those texts in {steps} steps of gradient descent."
            if steps
            else "Nothing was trained."
        ),
        [report],
    )
    return title, [section]
