"""What must be true of LoX, whatever its code."""

import pytest
import torch

from surgery.errors import UsageError
from surgery.methods.lox import LoX
from surgery.rounding import store

SHAPES = [(48, 33), (33, 48), (40, 40), (7, 65)]


def pair(shape, *, seed=0, scale=1e-2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    change = torch.randn(shape, generator=generator)
    left, right = torch.randn(shape[0], 3, generator=generator), torch.randn(3, shape[1], generator=generator)
    return (base + scale * (change + 3 * left @ right)).to(dtype), base.to(dtype)


def edit_of(method, aligned, base):
    """The full-precision edit, as a dense float64 matrix."""
    found = method.update(aligned, base, name="w", seed=0).edit
    return (found if isinstance(found, torch.Tensor) else found.dense()).double()


def truncated(delta, rank):
    """P_k(delta) by the full decomposition in float64."""
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("anchor", ["aligned", "base"])
@pytest.mark.parametrize("svd", ["certified", "exact"])
def test_the_edit_is_alpha_times_the_best_rank_k_part_of_the_difference(shape, anchor, svd):
    aligned, base = pair(shape)
    expected = 1.5 * truncated(aligned - base, 4)
    found = edit_of(LoX(rank=4, alpha=1.5, anchor=anchor, svd=svd), aligned, base)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    other = edit_of(LoX(rank=4, alpha=1.6, anchor=anchor, svd=svd), aligned, base)
    assert torch.linalg.norm(other - expected) > 1e-2 * torch.linalg.norm(expected)  # control


def test_alpha_zero_on_the_aligned_anchor_is_the_identity_byte_for_byte():
    aligned, base = pair((48, 33), dtype=torch.bfloat16)
    update = LoX(rank=6, alpha=0.0).update(aligned, base, name="w", seed=0)
    for mode in ("auto", "nearest", "compensated", "stochastic"):
        stored = store(aligned, update.edit, torch.bfloat16, mode=mode, seed=0, name="w")
        assert torch.equal(stored.weight.view(torch.int16), aligned.view(torch.int16))
    assert not torch.equal(aligned, base)  # control: there was something to extrapolate


@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_has_exactly_the_rank_asked_for(shape, rank):
    aligned, base = pair(shape)
    found = edit_of(LoX(rank=rank, alpha=1.0), aligned, base)
    expected = min(rank, *shape)
    assert torch.linalg.matrix_rank(found, rtol=1e-5) == expected
    assert torch.linalg.matrix_rank((aligned - base).double(), rtol=1e-5) == min(shape)  # control


def test_no_rank_k_subspace_captures_more_of_the_difference():
    """Eckart and Young, against random subspaces and ones near the best."""
    aligned, base = pair((48, 33))
    delta = (aligned - base).double()
    rest = torch.linalg.norm(delta - edit_of(LoX(rank=3, alpha=1.0), aligned, base))
    left = torch.linalg.svd(delta, full_matrices=False).U[:, :3]
    generator = torch.Generator().manual_seed(0)
    for size in [0.01] * 50 + [1.0] * 50:
        noise = torch.randn(left.shape, generator=generator, dtype=torch.float64)
        subspace = torch.linalg.qr(left + size * noise).Q
        assert torch.linalg.norm(delta - subspace @ (subspace.T @ delta)) >= rest * (1 - 1e-6)
    worse = torch.linalg.svd(delta, full_matrices=False).U[:, 1:4]
    assert torch.linalg.norm(delta - worse @ (worse.T @ delta)) > rest * 1.05  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base_anchor_with_alpha_one_and_full_rank_returns_the_aligned_weights(dtype):
    aligned, base = pair((48, 33), dtype=dtype)
    base[0, 0], aligned[0, 1] = 3e4, 2e-6  # magnitudes far apart, where float32 would lose bits
    update = LoX(rank="full", alpha=1.0, anchor="base").update(aligned, base, name="w", seed=0)
    stored = store(base, update.edit, dtype, mode="nearest", seed=0, name="w")
    assert torch.equal(stored.weight, aligned)
    low = LoX(rank=3, alpha=1.0, anchor="base").update(aligned, base, name="w", seed=0)
    assert not torch.equal(
        store(base, low.edit, dtype, mode="nearest", seed=0, name="w").weight, aligned
    )  # control


@pytest.mark.parametrize("alpha", [0.25, 1.25, 3.0])
def test_the_two_anchors_agree_on_the_subspace_for_one_plus_alpha_and_alpha(alpha):
    aligned, base = (tensor.double() for tensor in pair((48, 33)))
    from_aligned = aligned + edit_of(LoX(rank=4, alpha=alpha), aligned, base)
    from_base = base + edit_of(LoX(rank=4, alpha=1 + alpha, anchor="base"), aligned, base)
    left = torch.linalg.svd(aligned - base, full_matrices=False).U[:, :4]
    size = torch.linalg.norm(aligned - base)
    on_subspace = left.T @ (from_aligned - from_base)
    assert torch.linalg.norm(on_subspace) < 1e-9 * size
    tail = (aligned - base) - truncated(aligned - base, 4)
    assert torch.linalg.norm(from_aligned - from_base - tail) < 1e-9 * size
    assert torch.linalg.norm(tail) > 1e-2 * size  # control: off the subspace they do differ


def test_a_difference_of_low_rank_is_extrapolated_whole():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    delta = torch.randn(30, 2, generator=generator, dtype=torch.float64) @ torch.randn(
        2, 20, generator=generator, dtype=torch.float64
    )
    found = edit_of(LoX(rank=6, alpha=1.5), base + delta, base)
    assert torch.linalg.norm(found - 1.5 * delta) < 1e-10 * torch.linalg.norm(delta)


def test_lox_commutes_with_transposition():
    aligned, base = pair((48, 33))
    method = LoX(rank=4, alpha=1.5)
    straight, turned = (
        edit_of(method, aligned, base),
        edit_of(method, aligned.T.contiguous(), base.T.contiguous()),
    )
    assert torch.linalg.norm(straight - turned.T) < 1e-5 * torch.linalg.norm(straight)


def test_experts_are_edited_one_by_one():
    stacks = [pair((24, 18), seed=seed) for seed in range(5)]
    aligned, base = (torch.stack(side) for side in zip(*stacks, strict=True))
    together = edit_of(LoX(rank=2, alpha=1.5), aligned, base)
    for number, (one, other) in enumerate(stacks):
        expected = 1.5 * truncated(one - other, 2)
        assert torch.linalg.norm(together[number] - expected) < 1e-5 * torch.linalg.norm(expected)
    across = 1.5 * truncated((aligned - base).reshape(5, -1), 2).reshape(5, 24, 18)
    assert torch.linalg.norm(together - across) > 1e-2 * torch.linalg.norm(
        together
    )  # control: not over experts


def test_automatic_rank_finds_the_spikes_of_each_expert():
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(2, 90, 70)
    noise = 0.01 * torch.randn(2, 90, 70, generator=generator)
    spikes = torch.zeros(2, 90, 70)
    for expert, count in enumerate((2, 5)):
        left = torch.linalg.qr(torch.randn(90, count, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(70, count, generator=generator)).Q
        spikes[expert] = 2.0 * left @ right.T
    update = LoX(rank="auto", alpha=1.0).update(base + noise + spikes, base, name="w", seed=0)
    ranks = (update.edit.values != 0).sum(-1).tolist()
    assert ranks == [2, 5]
    assert update.rank == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"rank": -1},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"alpha": -0.1},
        {"alpha": 0.9, "anchor": "base"},
        {"tol": 0.0},
        {"tol": float("nan")},
        {"layers": "4"},
        {"layers": "5:5"},
        {"include": "("},
        {"max_rank": 0},
    ],
    ids=str,
)
def test_hyperparameters_that_make_no_sense_are_refused(fields):
    with pytest.raises(UsageError, match=next(iter(fields)).replace("_", "-")):
        LoX(**fields)
    LoX(alpha=0.0), LoX(alpha=1.0, anchor="base"), LoX(layers="4:"), LoX(layers=":20")  # controls
