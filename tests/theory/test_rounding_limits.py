"""Where rounding an edit meets its limits: dense edits, samples, ranges, memory, misuse."""

import pytest
import torch
from rounding_setup import (
    BF16,
    FP16,
    FP32,
    FP64,
    MODES,
    exact_sum,
    random_pair,
    random_weight,
    same_bytes,
    store_edit,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery import rounding
from surgery.errors import InputError, UsageError
from surgery.kernels import tiling
from surgery.kernels.store import Pass
from surgery.rounding import store
from surgery.spectral import Factors


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_coarser_dtype_than_the_anchors_counts_the_cast_as_noise_and_keeps_the_edit():
    weight, factors = random_pair(200, 300, ratio=1e-3, dtype=FP32)
    nearest, compensated = (store_edit(weight, factors, mode) for mode in ("nearest", "compensated"))
    # Off the grid the weights dither: nearest keeps the edit on average, with the noise of the cast itself.
    cast = (weight.bfloat16().double() - weight.double()).norm() / (1e-3 * weight.double().norm())
    assert nearest.noise == pytest.approx(cast.item(), rel=0.05)
    assert compensated.retention == pytest.approx(1.0, abs=2e-3)
    assert abs(compensated.retention - 1) <= abs(nearest.retention - 1) + 1e-3


@pytest.mark.parametrize("shape", [(150, 200), (2, 80, 90)], ids=str)
def test_an_edit_of_full_rank_is_compensated_along_its_own_direction(shape):
    weight = random_weight(*shape)
    edit = random_weight(*shape, dtype=FP32, seed=5) * 1e-3
    nearest, compensated = store_edit(weight, edit, "nearest"), store_edit(weight, edit, "auto")
    stored = compensated.weight.double() - weight.double()
    assert nearest.retention < 0.7
    assert compensated.mode == "compensated"
    assert (stored * edit).sum() / edit.double().square().sum() == pytest.approx(1.0, abs=2e-3)
    noise = torch.linalg.matrix_norm(stored - edit, 2) / torch.linalg.matrix_norm(edit.double(), 2)
    assert compensated.noise_spectral == pytest.approx(noise.max().item(), rel=0.1)
    assert compensated.noise < store_edit(weight, edit, "stochastic").noise


@pytest.mark.parametrize("mode", MODES)
def test_a_dense_edit_and_its_factors_are_rounded_alike(mode):
    weight, factors = random_pair(60, 70, ratio=1e-2, rank=1)
    dense = store_edit(weight, (factors.left * factors.values) @ factors.right, mode)
    low = store_edit(weight, factors, mode)
    assert (dense.weight != low.weight).float().mean() < 1e-3
    assert dense.retention == pytest.approx(low.retention, abs=1e-3)


def test_an_edit_too_small_for_compensation_keeps_the_best_that_was_found():
    weight, factors = random_pair(40, 50, ratio=1e-9)
    result = store_edit(weight, factors, "auto")
    assert result.mode == "compensated"
    assert result.iterations == rounding.PATIENCE
    assert result.retention < rounding.ENOUGH
    assert result.noise <= 1 + 1e-6  # roundoff
    stored = result.weight.double() - weight.double()
    assert result.noise_energy == pytest.approx(
        (stored - exact_sum(weight, factors)[1]).square().sum().item()
    )


@pytest.mark.parametrize("mode", ["auto", *MODES])
@pytest.mark.parametrize("shape", [(33, 65), (3, 17, 29)], ids=str)
def test_the_place_for_the_result_may_be_given(shape, mode):
    weight, factors = random_pair(*shape, ratio=2e-3, rank=3)
    for edit in (factors, Factors(factors.left, 0 * factors.values, factors.right)):
        place = torch.full(shape, torch.nan, dtype=BF16)
        result = store(weight, edit, BF16, mode=mode, seed=0, name="w", out=place)
        assert result.weight.data_ptr() == place.data_ptr()
        assert same_bytes(place, store_edit(weight, edit, mode).weight)
    for wrong in (place.float(), place[..., 1:], torch.empty(*shape, 2, dtype=BF16)[..., 0]):
        with pytest.raises(UsageError, match="place for the result"):
            store(weight, factors, BF16, mode=mode, seed=0, name="w", out=wrong)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_the_energy_of_the_anchor_is_that_of_float64(dtype):
    weight, factors = random_pair(700, 900, ratio=1e-3, dtype=dtype)
    exact = weight.double().square().sum().item()
    for edit in (factors, Factors(factors.left, 0 * factors.values, factors.right)):
        assert store_edit(weight, edit, "nearest").anchor_energy == pytest.approx(exact, rel=1e-6)
    assert weight[1:].double().square().sum().item() != pytest.approx(exact, rel=1e-6)  # control


def _in_few_rows(weight, rows, ratio):
    """An edit of rank 1 that lies in some rows only, `ratio` of those rows' weight."""
    left = torch.zeros(len(weight), 1)
    left[rows] = 1 / len(rows) ** 0.5
    right = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(3))
    size = ratio * weight[rows].double().norm().item()
    return Factors(left, torch.tensor([size]), right / right.norm())


@pytest.mark.parametrize(("ratio", "mode"), [(2e-2, "nearest"), (1e-3, "compensated")])
def test_a_sample_decides_nothing_where_the_edit_lies_in_few_rows(ratio, mode, monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 8 * 500)
    monkeypatch.setattr(rounding, "SAMPLE", 1 << 14)
    weight = random_weight(800, 500)
    edit = _in_few_rows(weight, list(range(40, 70)), ratio)
    result = store_edit(weight, edit, "auto")
    assert result.mode == mode
    assert result.retention == pytest.approx(1.0, abs=0.01)
    assert (store_edit(weight, edit, "nearest").retention >= rounding.ENOUGH) == (mode == "nearest")


@pytest.mark.parametrize("ratio", [1e-2, 1e-3, 3e-4])
def test_a_sample_changes_neither_the_mode_nor_what_compensation_reaches(ratio, monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 8 * 500)
    weight, factors = random_pair(1000, 500, ratio=ratio, rank=3)
    anchor, edit = exact_sum(weight, factors)
    written = []
    write, look = Pass.write, Pass.look
    monkeypatch.setattr(Pass, "write", lambda *args: written.append(1) or write(*args))
    monkeypatch.setattr(Pass, "look", lambda *args: written.extend([1] * (len(args) == 3)) or look(*args))
    passes = []
    for entries in (1 << 14, 1 << 30):
        monkeypatch.setattr(rounding, "SAMPLE", entries)
        written.clear()
        result = store_edit(weight, factors, "auto")
        passes.append(len(written))
        assert result.mode == ("nearest" if ratio == 1e-2 else "compensated")
        lost = edit - (result.weight.double() - anchor)
        residual = (factors.left.double().mT @ lost @ factors.right.double().mT).norm() / edit.norm()
        if result.mode == "compensated":
            assert residual <= rounding.CORE_TOLERANCE * 1.01
            assert abs(result.retention - 1) <= rounding.TOLERANCE * 1.01
    # The sample spares the pass to nearest that fails, where `auto` begins without one, and most looks at all rows.
    assert passes[0] < passes[1] if ratio < 1e-2 else passes[0] == passes[1]


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_a_sum_beyond_the_range_of_float16_is_refused(mode):
    anchor = torch.full((4, 5), 65_000.0, dtype=FP16)
    factors = Factors(torch.ones(4, 1) / 2, torch.tensor([4000.0 * 20**0.5]), torch.ones(1, 5) / 5**0.5)
    with pytest.raises(InputError, match=r"layers\.0.*float16.*--dtype bfloat16.*keep"):
        store_edit(anchor, factors, mode, FP16, name="layers.0")
    assert store_edit(anchor, factors, mode, FP32).weight.max().item() == pytest.approx(69_000, rel=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_refused(bad):
    weight, factors = random_pair(20, 30, ratio=1e-2)
    weight[7, 3] = bad
    for edit in (factors, factors.dense(), torch.zeros(20, 30)):
        with pytest.raises(InputError, match="w: the weight holds infinity or NaN"):
            store_edit(weight, edit, "auto")


def test_misuse_is_refused_by_name():
    weight, factors = random_pair(20, 30, ratio=1e-2)
    with pytest.raises(UsageError, match="int8"):
        store_edit(weight, factors, "auto", torch.int8)
    with pytest.raises(UsageError, match=r"\(30, 20\)"):
        store_edit(weight, Factors(factors.right.mT, factors.values, factors.left.mT), "auto")
    with pytest.raises(UsageError, match="not empty"):
        store_edit(weight[:0], factors.dense()[:0], "auto")


class _Allocations(TorchDispatchMode):
    """Where operations put their results, and how large the storage there is."""

    def __init__(self):
        super().__init__()
        self._seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._seen += [(storage.data_ptr(), storage.nbytes()) for storage in storages]
        return result

    def largest_beside(self, *tensors):
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return max(size for place, size in self._seen if place not in known)


@pytest.mark.parametrize("mode", MODES)
def test_beside_the_output_only_tiles_are_allocated(mode, monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 1 << 14)
    weight, factors = random_pair(1024, 512, ratio=1e-3)
    tile = 8 * (1 << 14)  # bytes, in float64
    with _Allocations() as allocations:
        result = store_edit(weight, factors, mode)
    assert allocations.largest_beside(weight, result.weight) <= tile
    with _Allocations() as allocations:
        whole = (weight + factors.dense()).to(BF16)
    assert allocations.largest_beside(weight, whole) > tile  # control
