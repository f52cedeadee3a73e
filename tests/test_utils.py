from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fast_transformers.utils import make_mirror


class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("omega", torch.randn(3))
        self.register_buffer("scratch", torch.randn(3), persistent=False)


class Model(nn.Module):
    def __init__(self, tied: bool):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.features = nn.Sequential(Random())
        self.scale = nn.Parameter(torch.ones(1))
        if tied:
            self.second.weight = self.first.weight


def test_parameters_and_buffers_are_shared():
    src, dst = Model(tied=False), Model(tied=False)
    keys = list(dst.state_dict())
    make_mirror(src, dst)
    for name, parameter in src.named_parameters():
        assert dst.get_parameter(name) is parameter
    for name, buffer in src.named_buffers():
        assert dst.get_buffer(name) is buffer
    assert list(dst.state_dict()) == keys
    src.load_state_dict(Model(tied=False).state_dict())
    with torch.no_grad():
        src.features[0].get_buffer("scratch").fill_(7)
    assert_close(dst.state_dict(), src.state_dict())
    assert_close(dst.get_buffer("features.0.scratch"), torch.full((3,), 7.0))


def test_tied_parameters_stay_tied():
    src, dst = Model(tied=True), Model(tied=False)
    make_mirror(src, dst)
    assert dst.first.weight is src.first.weight
    assert dst.second.weight is src.first.weight


def test_what_only_dst_has_is_left_alone():
    src, dst = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    weight = dst[1].weight
    make_mirror(src, dst)
    assert dst[1].weight is weight


def test_a_missing_buffer_is_created_as_persistent_as_in_src():
    dst = nn.Sequential(nn.Module())
    make_mirror(nn.Sequential(Random()), dst)
    assert list(dst.state_dict()) == ["0.omega"]
    assert dict(dst.named_buffers()).keys() == {"0.omega", "0.scratch"}


@pytest.mark.parametrize("path", ["first.weight", "features.0.omega"])
def test_a_missing_module_is_named(path):
    src, dst = Model(tied=False), Model(tied=False)
    del dst._modules[path.split(".")[0]]
    with pytest.raises(AttributeError, match=f"should hold '{path}'"):
        make_mirror(src, dst)
