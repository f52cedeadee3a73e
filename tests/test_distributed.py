"""Two processes that train a part of the batch each equal one process that trains on all of it."""

from __future__ import annotations

import copy
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from fast_transformers.builders import TransformerEncoderBuilder
from fast_transformers.feature_maps import ActivationFunctionFeatureMap
from fast_transformers.masking import TriangularCausalMask
from tests.maps import ALL
from tests.support import assert_as_accurate

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo"
)
RANKS, EACH, L, STEPS = 2, 2, 9, 3
SECONDS = 120  # until processes that wait for each other are stopped
RELU = {"relu": ActivationFunctionFeatureMap.factory(torch.relu)}


def build(feature_map, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return TransformerEncoderBuilder.from_kwargs(
        attention_type="causal-linear", feature_map=feature_map, n_layers=2, n_heads=2,
        query_dimensions=8, value_dimensions=6, feed_forward_dimensions=16, dropout=0.0,
    ).get()  # fmt: skip


def ddp(model: nn.Module) -> nn.Module:
    """Constructed under a seed for each rank: weights and features of rank 0 count."""
    return nn.parallel.DistributedDataParallel(model)


def ddp_without_broadcasts(model: nn.Module) -> nn.Module:
    """Every rank draws for itself, all the time."""
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flat(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {n: p.grad.clone() for n, p in model.module.named_parameters()}
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }


def train(rank: int, store: str, wrap, alike: bool, maps) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS,
        timeout=timedelta(seconds=SECONDS / 2),
    )  # fmt: skip
    mask = TriangularCausalMask(L)
    for name, feature_map in maps.items():
        model = wrap(build(feature_map, seed=0 if alike else rank))
        single = build(feature_map, seed=0)
        exact = copy.deepcopy(single).double()
        x, weight = torch.randn(2, RANKS * EACH, L, 12, generator=torch.Generator().manual_seed(1))
        mine = slice(rank * EACH, (rank + 1) * EACH)
        torch.manual_seed(100 + rank)
        draws = []
        for _ in range(STEPS):
            for module, rows in ((model, mine), (single, slice(None)), (exact, slice(None))):
                module.zero_grad()
                dtype = torch.float64 if module is exact else torch.float32
                loss = (module(x[rows].to(dtype), mask) * weight[rows]).sum((1, 2)).mean()
                loss.backward()
            buffers = dict(single.named_buffers())
            for own, expected in zip(model.buffers(), buffers.values(), strict=True):
                first = own.clone()
                distributed.broadcast(first, 0)
                assert torch.equal(own, first), name
                assert torch.equal(own, expected), name
            draws += [b.clone() for n, b in buffers.items() if n.endswith("omega")][:1]
            plain, true = gradients(single), gradients(exact)
            for key, gradient in gradients(model).items():  # sums over the batch, reordered
                assert_as_accurate(gradient, plain[key], true[key])
        assert len({float(omega.sum()) for omega in draws}) == len(draws), name
        assert bool(draws) == (name not in ("elu", "relu", "asymmetric")), name
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "alike", "maps"),
    [
        (ddp, False, {**ALL, **RELU}),
        (ddp_without_broadcasts, True, {**ALL, **RELU}),
        (sharded, True, {**ALL, **RELU}),
        (flat, True, {**ALL, **RELU}),
    ],
    ids=["ddp", "ddp-without-broadcasts", "fully_shard", "fsdp"],
)
def test_equals_one_process(wrap, alike, maps, tmp_path: Path) -> None:
    """The same random features on all ranks, also redrawn ones; gradients of the whole batch.

    The ranks' global generators differ in training, and in the first case in construction.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    context = multiprocessing.start_processes(
        train, (str(tmp_path / "store"), wrap, alike, maps), RANKS,
        join=False, start_method="forkserver",
    )  # fmt: skip
    assert context is not None
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the processes wait for each other"
    finally:
        for process in context.processes:
            process.kill()
