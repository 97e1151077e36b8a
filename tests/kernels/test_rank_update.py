"""The rank-k update with its roundings and figures: the Triton twin against torch and against float64."""

import pytest
import torch

from surgery.errors import UsageError
from surgery.kernels import philox, rounders
from surgery.rounding import store
from surgery.spectral import Factors

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Blocks are 64 x 64 by 16: these leave a ragged last block in every direction; 70 columns of probe are two programs.
SHAPES = [((1, 63, 100), 1), ((1, 129, 5), 5), ((1, 130, 70), 17), ((2, 40, 70), 70)]
DTYPES = [BF16, FP16, FP32]
KEY = philox.key(3, "layer.weight")


@pytest.fixture
def twin():
    return pytest.importorskip("surgery.kernels.rank_update_triton")


def whole(shape, rank, dtype, device):
    """A weight and two factors whose float32 sums have no rounding."""
    batch, m, n = shape
    generator = torch.Generator().manual_seed(m + n)

    def draw(*size, scale):
        return torch.randint(-100, 101, size, generator=generator).to(device, FP32) / scale

    # Tiny ones among the entries: there the grid is as fine as the edit.
    weight = draw(batch, m, n, scale=128) * 2.0 ** -torch.arange(0, 14, 2, device=device).repeat(n)[:n]
    return (
        weight.to(dtype),
        draw(batch, m, rank, scale=100).round(),
        draw(batch, rank, n, scale=100).round() / 2**14,
    )


def noisy(shape, rank, dtype, device):
    """A weight and two factors of a small edit, of which each sum is rounded."""
    batch, m, n = shape
    generator = torch.Generator().manual_seed(m * n)
    weight = 0.02 * torch.randn(batch, m, n, generator=generator)
    left, right = (torch.randn(batch, *size, generator=generator) for size in ((m, rank), (rank, n)))
    return weight.to(device, dtype), 1e-4 * left.to(device), right.to(device)


def run(twin, padded, weight, left, right, dtype, *, probe=None, intended=..., words=None, active=None):
    """What is stored, from views into NaN, and the sums."""
    out = padded(torch.full(weight.shape, torch.nan, dtype=dtype, device=weight.device))
    sums = twin.update(
        padded(weight),
        padded(left),
        padded(right),
        padded(right.mT.contiguous() if probe is None else probe),
        torch.ones(len(weight), dtype=torch.bool, device=weight.device) if active is None else active,
        out,
        intended=left if intended is ... else intended,
        grid=rounders.GRID[dtype],
        words=words,
    )
    return out, sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rank"), SHAPES, ids=str)
def test_nearest_is_the_exact_sum_rounded_once(shape, rank, dtype, twin, padded, device):
    weight, left, right = whole(shape, rank, dtype, device)
    exact = weight.double() + left.double() @ right.double()
    found, _ = run(twin, padded, weight, left, right, dtype)
    assert torch.equal(found, rounders.nearest(exact, dtype))
    without = weight.double() + left[..., 1:].double() @ right[:, 1:].double()
    assert not torch.equal(found, rounders.nearest(without, dtype))  # control: one column less is seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "rank"), SHAPES, ids=str)
def test_stochastic_bits_are_those_of_torch(shape, rank, dtype, twin, padded, device):
    weight, left, right = whole(shape, rank, dtype, device)
    exact = weight.float() + left @ right
    found, _ = run(twin, padded, weight, left, right, dtype, words=KEY)
    assert torch.equal(found, rounders.Stochastic(KEY)(exact, dtype, 0))
    if dtype != FP32:  # there the sum itself is stored
        assert not torch.equal(found, rounders.Stochastic(philox.key(4, "layer.weight"))(exact, dtype, 0))
        assert not torch.equal(found, rounders.Stochastic(KEY)(exact, dtype, 1))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # the interpreter, where squares are summed
@pytest.mark.parametrize("words", [None, KEY], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_ends_of_the_range_are_rounded_as_torch_does(dtype, words, twin, padded, device):
    info, smallest = torch.finfo(dtype), 2.0 ** rounders.GRID[dtype][1]
    values = torch.tensor(
        [0.0, -0.0, info.max, -info.max, smallest, -1.5 * smallest, 0.25 * smallest, info.tiny, 1 / 3],
        device=device,
    ).expand(1, 40, 9)
    none = torch.zeros(1, 40, 1, device=device), torch.zeros(1, 1, 9, device=device)
    found, _ = run(twin, padded, values, *none, dtype, words=words)
    rounder = rounders.nearest if words is None else rounders.Stochastic(words)
    expected = rounder(values + none[0] @ none[1], dtype, 0)
    assert torch.equal(found.contiguous().view(torch.int16), expected.view(torch.int16))
    assert not torch.equal(found.float(), values)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(("shape", "rank"), SHAPES, ids=str)
def test_sums_are_those_of_what_was_stored(shape, rank, dtype, twin, padded, device, relative_error):
    weight, left, right = noisy(shape, rank, dtype, device)
    probe = torch.randn(shape[0], shape[2], rank + 3, generator=torch.Generator().manual_seed(0)).to(device)
    found, sums = run(twin, padded, weight, 1.1 * left, right, dtype, probe=probe, intended=left)
    change = found.double() - weight.double()
    noise = change - left.double() @ right.double()
    for sum_, exact in (
        (sums.products, noise @ probe.double()),
        (sums.noise, noise.square().sum(-1)),
        (sums.anchor, weight.double().square().sum(-1)),
    ):
        assert relative_error(sum_, exact) < 1e-5
    assert relative_error(sums.products, change @ probe.double()) > 1e-3  # control: the edit is left out
    assert torch.equal(sums.changed, (found != weight).sum(-1))
    # The look: nothing stored, and the products are those of the change.
    kept, sums = run(twin, padded, weight, 1.1 * left, right, dtype, probe=probe, intended=None)
    assert kept.isnan().all()
    assert relative_error(sums.products, change @ probe.double()) < 1e-5


@pytest.mark.parametrize(("shape", "rank"), SHAPES, ids=str)
def test_the_image_is_that_of_the_stored_noise(shape, rank, twin, padded, device, relative_error):
    weight, left, right = noisy(shape, rank, BF16, device)
    stored, sums = run(twin, padded, weight, left, right, BF16)
    noise = stored.double() - weight.double() - left.double() @ right.double()
    found = twin.image(padded(weight), stored, padded(left), padded(right), padded(sums.products))
    assert relative_error(found, sums.products.double().mT @ noise) < 1e-5
    lost = twin.image(padded(weight), stored, padded(0 * left), padded(right), padded(sums.products))
    assert not relative_error(lost, sums.products.double().mT @ noise) < 1e-5  # control: without the edit


def test_matrices_that_are_not_asked_for_are_left_alone(twin, padded, device):
    weight, left, right = whole((3, 40, 70), 4, BF16, device)
    active = torch.tensor([True, False, True], device=device)
    found, sums = run(twin, padded, weight, left, right, BF16, active=active)
    every, whole_sums = run(twin, padded, weight, left, right, BF16)
    assert found[1].isnan().all()
    assert torch.equal(found[active], every[active])
    assert sums.changed[1].sum() == 0 < whole_sums.changed[1].sum()
    assert torch.equal(sums.products[active], whole_sums.products[active])


@pytest.mark.parametrize(
    ("shape", "mode"),
    [((63, 100), "nearest"), ((2, 40, 70), "stochastic"), ((63, 100), "compensated"), ((2, 40, 70), "auto")],
    ids=str,
)
def test_storing_gives_the_same_in_both_backends(shape, mode, device, monkeypatch):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    *batch, m, n = shape
    weight = (0.02 * torch.randn(*shape, generator=generator)).to(device, BF16)
    left, right = (torch.linalg.qr(torch.randn(*batch, side, 4, generator=generator)).Q for side in (m, n))
    values = torch.full((*batch, 4), 1e-5 * (m * n) ** 0.5)
    edit = Factors(left.to(device), values.to(device), right.mT.contiguous().to(device))
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SURGERY_KERNELS", backend)
        found[backend] = store(weight, edit, BF16, mode=mode, seed=0, name="w")
    one, other = found["torch"], found["triton"]
    # Where float32 sums differ in the last bit an entry in ten thousand may fall on the other side of a tie.
    assert (one.weight != other.weight).float().mean() < 1e-3
    for figure in ("retention", "noise", "noise_spectral", "anchor_energy", "edit_energy"):
        assert getattr(one, figure) == pytest.approx(getattr(other, figure), rel=5e-3)
    assert one.mode == other.mode
    assert (one.weight != weight).float().mean() > 0.05  # control


def test_sums_in_float64_are_refused_where_triton_is_asked_for(device, monkeypatch):
    pytest.importorskip("triton")
    edit = Factors(
        torch.eye(4, 1, device=device), torch.ones(1, device=device), torch.eye(1, 5, device=device)
    )
    weight = torch.ones(4, 5, dtype=BF16, device=device)
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    with pytest.raises(UsageError, match="float64"):
        store(weight, edit, FP32, mode="nearest", seed=0, name="w")
    monkeypatch.setenv("SURGERY_KERNELS", "torch")
    assert store(weight, edit, FP32, mode="nearest", seed=0, name="w").weight[0, 0] == 2


def test_an_edit_of_full_rank_is_refused_where_triton_is_asked_for(device, monkeypatch):
    weight = torch.ones(4, 6, dtype=BF16, device=device)

    def stored():
        return store(weight, torch.ones(4, 6, device=device), BF16, mode="nearest", seed=0, name="w")

    assert (stored().weight == 2).all()
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    with pytest.raises(UsageError, match="full rank are stored by torch alone"):
        stored()
