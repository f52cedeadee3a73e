from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.testing import assert_close

from fast_transformers.masking import (
    BaseMask,
    FullMask,
    LengthMask,
    TriangularCausalMask,
    as_mask,
    key_padding,
)

PADDED = torch.tensor([[True, True, False], [True, False, False]])


class Banded(BaseMask):
    """A mask as users write them: `bool_matrix` and nothing else."""

    @property
    def bool_matrix(self):
        return torch.ones(4, 4).tril().triu(-1).bool()


@pytest.fixture
def no_reading(monkeypatch):
    """Fails when a tensor's data is looked at, which on a GPU would wait for the device."""

    def read(*args, **kwargs):
        raise AssertionError("the data of a tensor was read")

    for name in ("item", "__bool__", "__int__", "__float__", "__index__", "tolist", "equal"):
        monkeypatch.setattr(torch.Tensor, name, read)
    monkeypatch.setattr(torch, "equal", read)


@pytest.mark.parametrize(
    ("args", "kwargs", "shape"),
    [
        ((10,), {}, (10, 10)),
        ((10, 5), {}, (10, 5)),
        ((10,), {"M": 5}, (10, 5)),
        ((), {"N": 10}, (10, 10)),
        ((), {"N": 10, "M": 5}, (10, 5)),
        ((), {"N": 10, "M": 0}, (10, 10)),
        ((10, 5, 3), {}, (5, 3)),
        ((1,), {}, (1, 1)),
    ],
)
def test_full_mask_of_a_size(args, kwargs, shape, no_reading):
    mask = FullMask(*args, **kwargs)
    assert mask.shape == shape
    assert mask.all_ones is True
    assert mask.known_all_ones is True
    assert mask.lower_triangular is (shape == (1, 1))


def test_full_mask_of_a_size_keeps_everything():
    mask = FullMask(3, 2)
    assert_close(mask.bool_matrix, torch.ones(3, 2, dtype=torch.bool))
    assert_close(mask._mask, mask.bool_matrix)
    assert mask.bool_matrix.untyped_storage().nbytes() == 1


def test_full_mask_copies_its_tensor():
    matrix = PADDED.clone()
    mask = FullMask(matrix, N=7, M=9)
    matrix.fill_(True)
    assert_close(mask.bool_matrix, PADDED)


def test_full_mask_refuses_other_types():
    with pytest.raises(ValueError, match=r"expects the mask to be bool, got torch\.float32"):
        FullMask(torch.ones(3, 3))
    with pytest.raises(ValueError, match="Either mask or N should be provided"):
        FullMask()


def test_derived_matrices():
    mask = FullMask(PADDED)
    assert_close(mask.float_matrix, torch.tensor([[1.0, 1, 0], [1, 0, 0]]))
    assert_close(
        mask.additive_matrix, torch.tensor([[0, 0, -math.inf], [0, -math.inf, -math.inf]])
    )
    assert_close(mask.additive_matrix_finite, torch.tensor([[0, 0, -1e24], [0, -1e24, -1e24]]))
    assert mask.float_matrix is mask.float_matrix
    assert mask.all_ones is False


def test_what_is_read_from_data_is_read_once(monkeypatch):
    mask = FullMask(torch.ones(3, 3).tril().bool())
    assert (mask.all_ones, mask.lower_triangular) == (False, True)
    monkeypatch.setattr(mask, "_mask", None)
    assert (mask.all_ones, mask.lower_triangular) == (False, True)


def test_lengths_of_a_matrix():
    assert_close(FullMask(PADDED).lengths, torch.tensor([2, 1]))
    three_d = PADDED.expand(4, 2, 3).transpose(0, 1)
    assert_close(FullMask(three_d).lengths, torch.tensor([2, 1])[:, None].expand(2, 4))
    for row in ([False, True], [True, False, True]):
        with pytest.raises(ValueError, match="The mask is not a length mask"):
            _ = FullMask(torch.tensor([row])).lengths


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (torch.ones(4, 4).tril(), True),
        (torch.ones(4, 6).tril(), True),
        (torch.ones(6, 4).tril(), False),
        (torch.ones(4, 4).triu(), False),
        (torch.ones(4, 4).tril(-1), False),
        (torch.ones(4, 4), False),
        (torch.ones(1, 1), True),
        (torch.ones(2, 4, 4).tril(), False),
    ],
)
def test_lower_triangular(matrix, expected):
    assert FullMask(matrix.bool()).lower_triangular is expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
def test_length_mask(dtype):
    lengths = torch.tensor([2, 0, 3], dtype=dtype)
    mask = LengthMask(lengths, max_len=3)
    expected = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert_close(mask.bool_matrix, expected)
    assert_close(LengthMask(lengths).bool_matrix, expected)
    assert mask.shape == (3, 3)
    assert mask.all_ones is False
    lengths.fill_(3)
    assert_close(mask._lengths, torch.tensor([2, 0, 3], dtype=dtype))
    assert mask.lengths is mask._lengths


def test_length_mask_counts_exactly_in_half_precision():
    mask = LengthMask(torch.tensor([512.0], dtype=torch.bfloat16), max_len=600)
    assert mask.bool_matrix.sum() == 512


def test_length_mask_is_lazy(no_reading):
    mask = LengthMask(torch.tensor([2, 3]), max_len=3)
    assert mask.shape == (2, 3)
    assert mask.known_all_ones is False
    full = LengthMask.full(2, 3)
    assert (full.all_ones, full.known_all_ones, full.max_len) == (True, True, 3)
    assert LengthMask(torch.tensor([2, 3])).at_width(5).shape == (2, 5)


def test_length_mask_corners():
    assert LengthMask([3, 3]).all_ones is True
    assert LengthMask(torch.tensor([5, 4]), max_len=3).all_ones is True
    assert_close(LengthMask(torch.tensor([5, 4]), max_len=3).lengths, torch.tensor([5, 4]))
    assert LengthMask([1, 2, 3]).lower_triangular is True
    assert LengthMask([1, 2, 2]).lower_triangular is False
    assert LengthMask([2.5]).shape == (1, 3)
    assert LengthMask([2, 1], max_len=0).shape == (2, 2)
    assert LengthMask(torch.tensor([2, 1]), max_len=torch.tensor(4)).shape == (2, 4)  # type: ignore
    assert_close(LengthMask.full(2, 3).bool_matrix, torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="pass max_len"):
        LengthMask(torch.tensor([], dtype=torch.int64))
    with pytest.raises(TypeError, match="FullMask"):
        LengthMask(PADDED)


def test_at_width():
    lengths = torch.tensor([1, 2])
    assert_close(LengthMask(lengths).at_width(3), torch.tensor([[1, 0, 0], [1, 1, 0]]).bool())
    assert_close(LengthMask(lengths, max_len=2).at_width(2), torch.tensor([[1, 0], [1, 1]]).bool())
    with pytest.raises(ValueError, match=r"must be 3.*got 2.*max_len=3"):
        LengthMask(lengths, max_len=2).at_width(3)


def test_triangular_causal_mask(no_reading):
    mask = TriangularCausalMask(5)
    assert isinstance(mask, LengthMask)
    assert (mask.shape, mask.all_ones, mask.lower_triangular) == ((5, 5), False, True)
    assert TriangularCausalMask(1).all_ones is True


def test_triangular_causal_mask_matrix():
    assert_close(TriangularCausalMask(4).bool_matrix, torch.ones(4, 4).tril().bool())
    with pytest.raises(ValueError, match="N must be at least 1, got 0"):
        TriangularCausalMask(0)


def test_bool_matrix_is_all_a_subclass_needs():
    mask = Banded()
    assert (mask.shape, mask.all_ones, mask.lower_triangular) == ((4, 4), False, False)
    assert mask.float_matrix.sum() == 7
    assert mask.to("cpu") is mask
    with pytest.raises(NotImplementedError, match="bool_matrix"):
        _ = BaseMask().shape


@pytest.mark.parametrize(
    "mask",
    [FullMask(3, 2), FullMask(PADDED), LengthMask([2, 1], max_len=3), TriangularCausalMask(3)],
)
def test_to_a_device(mask):
    assert mask
    assert mask.to("cpu") is mask
    _ = mask.bool_matrix
    moved = mask.to("meta")
    assert type(moved) is type(mask)
    assert moved.bool_matrix.device.type == "meta"
    assert moved.shape == mask.shape
    assert moved.known_all_ones == mask.known_all_ones
    assert mask.bool_matrix.device.type == "cpu"
    for twin in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert_close(twin.bool_matrix, mask.bool_matrix)


def test_a_moved_all_ones_mask_still_takes_no_memory():
    moved = FullMask(100, 100).to("meta")
    assert moved.bool_matrix.stride() == (0, 0)
    assert moved.lower_triangular is False


def test_first_use_in_inference_mode_does_not_spoil_training():
    mask = TriangularCausalMask(3)
    with torch.inference_mode():
        _ = mask.float_matrix
    x = torch.ones(3, 3, requires_grad=True)
    (x * mask.float_matrix).sum().backward()
    assert_close(x.grad, torch.ones(3, 3).tril())


def test_compiles_without_a_break():
    def drop(x, mask):
        return x.masked_fill(~mask.bool_matrix, 0.0)

    compiled = torch.compile(drop, fullgraph=True, backend="eager")
    for mask in (TriangularCausalMask(3), LengthMask([1, 2, 3], max_len=3), FullMask(3)):
        assert_close(compiled(torch.ones(3, 3), mask), mask.float_matrix)


def test_as_mask():
    mask = FullMask(3)
    assert as_mask(mask, "attn_mask") is mask
    assert_close(as_mask(PADDED, "attn_mask").bool_matrix, PADDED)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([3, 4]), r"int64 tensor of shape \(2,\).*LengthMask\(lengths, max_len=.*\)"),
        (torch.ones(2, 3), r"float32 tensor of shape \(2, 3\).*mask\.bool\(\).*opposite"),
        (torch.ones(2, 3, dtype=torch.int64), r"mask\.bool\(\)"),
        ([3, 4], "got list"),
        (None, "got NoneType"),
    ],
)
def test_as_mask_refuses(mask, message):
    with pytest.raises(TypeError, match=f"length_mask must be a mask.*{message}"):
        as_mask(mask, "length_mask")


def test_key_padding():
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    assert_close(key_padding(LengthMask([2, 1]), 2, 4), expected)
    assert_close(key_padding(LengthMask([2, 1], max_len=4), 2, 4), expected)
    assert_close(key_padding(FullMask(expected), 2, 4), expected)
    assert_close(key_padding(FullMask(expected[:1]), 2, 4), expected[:1].expand(2, 4))
    assert key_padding(LengthMask.full(2, 4), 2, 4) is None
    assert key_padding(FullMask(1, 4), 2, 4) is None


def test_key_padding_widens_a_mask_that_is_all_ones_at_its_own_width():
    mask = LengthMask([2, 2])
    assert mask.all_ones is True
    assert mask.known_all_ones is False
    assert_close(key_padding(mask, 2, 3), torch.tensor([[1, 1, 0], [1, 1, 0]]).bool())


def test_key_padding_does_not_wait(no_reading):
    keep = key_padding(LengthMask(torch.tensor([2, 2])), 2, 3)
    assert keep is not None
    assert keep.shape == (2, 3)


@pytest.mark.parametrize(
    "mask",
    [LengthMask([2, 1], max_len=3), LengthMask([1, 1, 1]), FullMask(2, 3), FullMask(3, 4)],
)
def test_key_padding_refuses_another_shape(mask):
    with pytest.raises(
        ValueError, match=r"memory_length_mask must have shape \(2, 4\).*max_len=4"
    ):
        key_padding(mask, 2, 4, "memory_length_mask")
