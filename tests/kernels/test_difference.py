"""Products with A - B: the torch reference and the Triton twin against float64."""

import inspect

import pytest
import torch

from surgery.errors import UsageError
from surgery.kernels import difference, difference_triton, tiling

# (batch, m, n, b): Triton's blocks are 32 x 64 by 16, a tile of the reference 2^14 entries; 300 x 70 is more than one
# block for every group of the Gram product and more than one tile.
SHAPES = [(1, 1, 1, 1), (2, 63, 100, 5), (3, 64, 64, 16), (1, 129, 5, 17), (1, 300, 70, 2)]
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
]
# Float32 sums of up to 300 terms of random sign: a few times the roundoff 2^-24.
BOUND = 2.0**-24 * 8


@pytest.fixture(autouse=True)
def _small_tiles_and_few_groups(monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 1 << 14)
    monkeypatch.setattr(difference_triton, "_GROUPS", 3)


def names(value):
    return str(value).removeprefix("torch.")


def pair(shape, dtypes=PAIRS[0], scale=0.02):
    batch, m, n, b = shape
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    aligned = torch.randn(batch, m, n, generator=generator)
    base = aligned + scale * torch.randn(batch, m, n, generator=generator)
    columns = torch.randn(batch, max(m, n), b, generator=generator)
    return aligned.to(dtypes[0]), base.to(dtypes[1]), columns


def exact(aligned, base):
    return aligned.double() - base.double()


@pytest.mark.parametrize("dtypes", PAIRS, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_exact_difference(shape, dtypes, backend, device, padded, relative_error):
    aligned, base, columns = (tensor.to(device) for tensor in pair(shape, dtypes))
    _, m, n, _ = shape
    right, left = columns[:, :n], columns[:, :m]
    delta = exact(aligned, base)
    ours, theirs = padded(aligned), padded(base)
    image = delta @ right.double()
    assert relative_error(difference.right_product(ours, theirs, padded(right)), image) < BOUND
    found = difference.left_product(ours, theirs, padded(left))
    assert relative_error(found, delta.mT @ left.double()) < BOUND
    assert found.dtype == torch.float32
    both = difference.gram_product(ours, theirs, padded(right))
    assert relative_error(both[0], image) < BOUND
    assert relative_error(both[1], delta.mT @ image) < BOUND


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_energy_is_the_sum_of_squares(shape, backend, device, padded, relative_error):
    aligned, base, _ = (tensor.to(device) for tensor in pair(shape))
    found = difference.energy(padded(aligned), padded(base))
    assert found.squares.dtype == torch.float64
    assert bool(found.finite.all())
    assert relative_error(found.squares, exact(aligned, base).square().sum((1, 2))) < 1e-13


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_the_matrix_with_a_non_finite_entry_is_named(bad, backend, device):
    aligned, base, _ = (tensor.to(device) for tensor in pair((3, 63, 100, 1)))
    aligned[1, 62, 99] = bad
    assert difference.energy(aligned, base).finite.tolist() == [True, False, True]


def test_weights_that_are_the_same_give_zero(backend, device):
    aligned, _, columns = (tensor.to(device) for tensor in pair((2, 63, 100, 5)))
    assert not difference.right_product(aligned, aligned, columns[:, :100]).any()
    assert difference.energy(aligned, aligned).squares.tolist() == [0.0, 0.0]


def test_transposed_weights_need_no_copy(backend, device, relative_error):
    aligned, base, columns = (tensor.to(device) for tensor in pair((2, 63, 100, 5)))
    found = difference.right_product(aligned.mT, base.mT, columns[:, :63])
    assert relative_error(found, exact(aligned, base).mT @ columns[:, :63].double()) < BOUND


def test_more_columns_than_a_program_holds_are_all_multiplied(backend, device, relative_error):
    aligned, base, columns = (tensor.to(device) for tensor in pair((1, 33, 40, 150)))
    image, product = difference.gram_product(aligned, base, columns)
    assert relative_error(image, exact(aligned, base) @ columns.double()) < BOUND
    assert relative_error(product, exact(aligned, base).mT @ image.double()) < BOUND


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_weights_give_empty_or_zero_products(shape, backend, device):
    aligned = torch.ones(shape, device=device)
    batch, m, n = shape
    image, product = difference.gram_product(aligned, aligned, torch.ones(batch, n, 2, device=device))
    assert image.shape == (batch, m, 2)
    assert not image.any()
    assert product.shape == (batch, n, 2)
    assert not product.any()
    left = difference.left_product(aligned, aligned, torch.ones(batch, m, 2, device=device))
    assert left.shape == (batch, n, 2)
    assert not left.any()
    assert difference.energy(aligned, aligned).squares.tolist() == [0.0] * batch


def test_float64_weights_are_computed_in_float64(relative_error):
    aligned, base, columns = pair((2, 63, 100, 5), (torch.float64, torch.bfloat16))
    image, product = difference.gram_product(aligned, base, columns)
    delta = exact(aligned, base)
    assert image.dtype == product.dtype == torch.float64
    assert relative_error(product, delta.mT @ (delta @ columns.double())) < 1e-14
    assert relative_error(difference.energy(aligned, base).squares, delta.square().sum((1, 2))) < 1e-14


def test_the_difference_is_not_rounded_to_the_dtype_of_the_weights(backend, device, relative_error):
    """A control: where bfloat16 rounds the difference, the bound of these tests is missed a thousandfold."""
    aligned, base, columns = (tensor.to(device) for tensor in pair((2, 63, 100, 5), scale=1.0))
    delta, columns = exact(aligned, base), columns[:, :100]
    rounded = (aligned - base).double() @ columns.double()
    assert relative_error(rounded, delta @ columns.double()) > 1000 * BOUND
    assert relative_error(difference.right_product(aligned, base, columns), delta @ columns.double()) < BOUND


def test_a_read_outside_of_a_view_would_show(padded, relative_error):
    """A control: the NaN around a padded view reaches the result of a product with one row too many."""
    aligned, _, columns = pair((1, 63, 100, 5))
    view = padded(aligned)
    wider = view.as_strided((1, 63, 101), view.stride(), view.storage_offset())
    found = difference.right_product(wider, torch.zeros_like(wider), columns.new_ones(1, 101, 5))
    assert not relative_error(found, torch.ones(1, 63, 5)) < BOUND


def test_memory_handed_out_unwritten_holds_nan():
    """A control of the fixture that poisons outputs."""
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.empty_like(torch.ones(3)).isnan().all())
    assert bool(torch.ones(2).new_empty(3).isnan().all())


def test_the_reference_never_holds_the_difference(monkeypatch):
    """The largest buffer asked for is a tile."""
    monkeypatch.setenv("SURGERY_KERNELS", "torch")
    asked = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kwargs: asked.append(shape) or empty(*shape, **kwargs)
    )
    aligned = torch.ones(1, 3000, 700, dtype=torch.bfloat16)
    difference.gram_product(aligned, aligned, torch.ones(1, 700, 3))
    assert asked == [(1, 23, 700)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.ones(3, 4), torch.ones(3, 4), torch.ones(4, 2)), "unsqueeze"),
        ((torch.ones(1, 3, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 2)), "equal stacks"),
        ((torch.ones(1, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 2)), r"\(1, 4, b\)"),
        ((torch.ones(1, 3, 4), torch.ones(1, 3, 4).int(), torch.ones(1, 4, 2)), "int32"),
    ],
    ids=["matrices", "transposed", "columns", "integers"],
)
def test_what_does_not_fit_is_refused(arguments, told):
    """Also where nothing checks the annotations."""
    with pytest.raises(UsageError, match=told):
        inspect.unwrap(difference.right_product)(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_a_gpu_computes_in_float32_and_not_in_tf32(backend_name, monkeypatch, relative_error):
    monkeypatch.setenv("SURGERY_KERNELS", backend_name)
    aligned, base, columns = (tensor.cuda() for tensor in pair((2, 300, 4100, 16), PAIRS[2]))
    delta = exact(aligned, base)
    image, product = difference.gram_product(aligned, base, columns)
    assert relative_error(image, delta @ columns.double()) < 2.0**-20
    assert relative_error(product, delta.mT @ (delta @ columns.double())) < 2.0**-20


@pytest.mark.gpu
def test_a_gpu_reaches_entries_beyond_32_bit_indices(monkeypatch):
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    aligned = torch.zeros(1, 70000, 32768, dtype=torch.bfloat16, device="cuda")
    aligned[0, -1, -1] = 3.0
    base = torch.zeros(1, 1, 1, dtype=torch.bfloat16, device="cuda").expand(aligned.shape)
    assert difference.energy(aligned, base).squares.tolist() == [9.0]
    image = difference.right_product(aligned, base, torch.ones(1, 32768, 1, device="cuda"))
    assert image[0, -1].tolist() == [3.0]
    assert not image[0, :-1].any()
