"""Block-scaled fp8: codes, scales and what they stand for."""

import math

import pytest
import torch

from surgery.checkpoint import fp8
from surgery.checkpoint.quantised import Scaling
from surgery.errors import InputError

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
VALUES = CODES.to(torch.float64)
NUMBERS = ~VALUES.isnan()
BLOCK = Scaling("w_scale_inv", (128, 128))


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def by_hand(scaled):
    """The weight in float64, entry by entry of every block."""
    height, width = scaled.scaling.block
    weight = scaled.codes.double()
    for row in range(scaled.scales.shape[-2]):
        for column in range(scaled.scales.shape[-1]):
            at = (..., slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width))
            weight[at] *= scaled.scales[..., row, column, None, None].double()
    return weight


def test_every_code_is_decoded_exactly():
    assert torch.equal(fp8.decode(CODES)[NUMBERS].double(), VALUES[NUMBERS])
    assert torch.equal(fp8.decode(CODES).signbit(), torch.arange(256) >= 128)
    assert fp8.decode(CODES)[~NUMBERS].abs().tolist() == [480.0, 480.0]


def test_encoding_takes_the_nearest_code_and_the_even_one_of_two():
    grid = VALUES[NUMBERS].unique()
    middles = (grid[1:] + grid[:-1]) / 2
    values = torch.cat((sample(4000).double() * 5000, middles, grid)).float()
    found = fp8.encode(values).double()
    distance = (values.double()[:, None] - grid).abs()
    assert torch.equal((values.double() - found).abs(), distance.min(1).values)
    even = fp8.encode(middles.float()).view(torch.uint8) % 2
    assert not even.any()
    assert (
        fp8.encode(middles.float() * 1.01).view(torch.uint8) % 2
    ).any()  # control: odd codes are there to take


def test_what_is_too_large_becomes_the_largest():
    values = torch.tensor([448.0, 449.0, 463.9, 464.0, 1e30, -1e30])
    assert fp8.encode(values).float().tolist() == [448.0] * 5 + [-448.0]


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_number_are_found(code):
    codes = torch.arange(250, dtype=torch.uint8)
    codes[codes == 0x7F] = 0
    assert fp8.is_finite(codes.view(torch.float8_e4m3fn))
    codes[77] = code
    assert not fp8.is_finite(codes.view(torch.float8_e4m3fn))
    assert fp8.is_finite(codes[:0].view(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((200, 300), (128, 128)),
        ((7, 5), (128, 128)),
        ((256, 128), (128, 128)),
        ((33, 50), (16, 8)),
        ((1, 9), (1, 4)),
        ((3, 130, 129), (128, 128)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantised_weights_are_codes_times_the_scale_of_their_block(shape, block, dtype):
    scaling, weight = Scaling("s", block), sample(*shape)
    found = fp8.quantise(weight, dtype, scaling)
    assert tuple(found.scales.shape) == scaling.grid(shape)
    wanted = by_hand(found)
    assert torch.allclose(found.dequantised().double(), wanted, rtol=2.0**-23, atol=0)
    error = (wanted - weight.double()).abs()
    half = torch.maximum(
        weight.double().abs() / 16, by_hand(fp8.Scaled(torch.ones_like(found.codes), *rest(found))) / 1024
    )
    assert (error <= half * (1 + 1e-2)).all()
    other = fp8.Scaled(found.codes, found.scales * 1.1, scaling)  # control: other scales, another weight
    assert not torch.allclose(other.dequantised().double(), wanted, rtol=1e-2, atol=0)


def rest(scaled):
    return scaled.scales, scaled.scaling


def test_fresh_scales_make_the_largest_entry_the_largest_value():
    weight = sample(200, 300)
    weight[128:, 256:] = 0
    found = fp8.quantise(weight, torch.float32, BLOCK)
    assert float(found.scales[1, 2]) == 1.0
    corner = weight[:128, :128].abs().max() / 448
    assert float(found.scales[0, 0]) == pytest.approx(float(corner), rel=1e-6)
    assert float(found.codes[:128, :128].float().abs().max()) == 448


def test_powers_of_two_are_the_next_ones_up():
    scaling = Scaling("s", (4, 4), powers_of_two=True)
    largest = torch.tensor([448.0, 448.0001, 447.0, 896.0, 3.5, 1e-3, 0.0])
    found = fp8.fresh_scales(largest, torch.float32, scaling)
    wanted = [2.0 ** math.ceil(math.log2(value / 448)) if value else 1.0 for value in largest.tolist()]
    assert found.tolist() == wanted


def test_quantising_again_gives_the_same_codes():
    first = fp8.quantise(sample(200, 300), torch.float32, BLOCK)
    second = fp8.quantise(first.dequantised(), torch.float32, BLOCK)
    assert torch.equal(first.codes.view(torch.uint8), second.codes.view(torch.uint8))
    assert torch.allclose(first.scales, second.scales, rtol=1e-6, atol=0)


def test_tiny_blocks_keep_a_scale_that_is_not_zero():
    found = fp8.quantise(torch.full((4, 4), 1e-44), torch.float16, BLOCK)
    assert float(found.scales[0, 0]) > 0
    assert fp8.is_finite(found.codes)


def test_a_scale_that_does_not_fit_its_dtype_is_refused_by_name():
    with pytest.raises(InputError, match=r"w_scale_inv.*float16"):
        fp8.fresh_scales(torch.tensor([1e9]), torch.float16, BLOCK)
