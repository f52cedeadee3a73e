"""Who is compared: one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fast_transformers.feature_maps import Favor

from .worker.jobs import DIM
from .worker.ours import FEATURES, SEED


@dataclass(frozen=True)
class Contender:
    """One implementation of attention over a whole sequence, with one feature map.

    Attributes:
        name: how tables call it.
        home: the worker that runs it, a module of :mod:`.worker`.
        map: the feature map, None for softmax.
    """

    name: str
    home: str
    map: str | None

    def growth(self, causal: bool) -> int:
        """The power of the length with which the time grows."""
        # performer-pytorch cuts any causal sequence into 128 chunks, which outgrow the caches
        return 2 if self.map is None or (causal and self.home == "performer") else 1

    def job(self, causal: bool, batch: int, length: int, backward: bool) -> tuple[str, dict]:
        """The task of the worker and its options."""
        options: dict[str, Any] = {
            "causal": causal, "batch": batch, "length": length, "backward": backward
        }  # fmt: skip
        if self.map is None:
            return "softmax", options
        return "linear", options | map_options(self.map)


def map_options(name: str) -> dict[str, Any]:
    """What a worker has to know of a feature map; all contenders share the random matrix."""
    options: dict[str, Any] = {"map": name}
    if name == FAVOR:
        options["omega"] = shared_favor().omega
    return options


def shared_favor() -> Favor:
    """The map whose random matrix every contender with Favor is given."""
    return Favor(DIM, n_dims=FEATURES, generator=SEED)


ELU, FAVOR = "elu+1", f"Favor {FEATURES}"
OURS = {ELU: f"ours, {ELU}", FAVOR: f"ours, {FAVOR}"}
SDPA = "SDPA"

CONTENDERS = [
    Contender(OURS[ELU], "ours", ELU),
    Contender(OURS[FAVOR], "ours", FAVOR),
    Contender(SDPA, "ours", None),
    Contender(f"older library, {ELU}", "older", ELU),
    Contender(f"older library, {FAVOR}", "older", FAVOR),
    Contender(f"performer-pytorch, {FAVOR}", "performer", FAVOR),
]

NOT_MEASURED = {
    "flash-linear-attention": "its operations are Triton kernels for GPUs; on a CPU they end in "
    "Triton's error '0 active drivers' (version 0.6.0)",
}
