"""The rerouting loss and its gradient: both backends against the formula in float64."""

import inspect

import pytest
import torch

from surgery.errors import UsageError
from surgery.kernels import rerouting as module
from surgery.kernels.rerouting import rerouting_loss

# (layers, batch, tokens, d): blocks are 16 tokens by 128 entries.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 17, 128), (3, 1, 4, 300)]
# Sums of up to 300 products in float32, and a mean over tokens.
BOUND = 2.0**-24 * 16
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def _many_pieces(monkeypatch):
    """Pieces so small that the reference needs several, the last one ragged."""
    monkeypatch.setattr(module, "_ENTRIES", 700)


def naive(hidden, original, mask):
    """The definition, for vectors that are not zero."""
    cosine = torch.nn.functional.cosine_similarity(hidden, original, dim=-1, eps=1e-300)
    return torch.relu(cosine)[:, mask].sum() / (len(hidden) * mask.sum())


def drawn(shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    hidden = torch.randn(shape, generator=generator)
    original = hidden * 0.2 + torch.randn(shape, generator=generator)
    mask = torch.rand(shape[1:3], generator=generator) < 0.7
    mask[0, 0] = True
    return hidden.to(device, dtype), original.to(device, dtype), mask.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_those_of_the_formula(shape, dtype, backend, device, padded, relative_error):
    hidden, original, mask = drawn(shape, dtype, device)
    exact_hidden = hidden.double().requires_grad_()
    exact = naive(exact_hidden, original.double(), mask)
    exact.backward()
    hidden = padded(hidden).requires_grad_()
    found = rerouting_loss(hidden, padded(original), mask)
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < BOUND
    found.backward()
    assert hidden.grad.dtype == dtype
    # A vector of one entry has cosine 1 or -1 and no gradient: what is left is roundoff of terms of size 1.
    size = float(exact_hidden.grad.square().mean().sqrt()) if shape[-1] > 1 else 1.0
    error = float((hidden.grad.double() - exact_hidden.grad).square().mean().sqrt())
    assert error < max(BOUND, HALF.get(dtype, 0.0)) * size


def test_the_gradient_is_the_derivative():
    hidden, original, mask = drawn((2, 2, 3, 4), torch.float64)
    hidden.requires_grad_()
    assert torch.autograd.gradcheck(lambda states: rerouting_loss(states, original, mask), (hidden,))


def test_float64_states_are_computed_in_float64(relative_error):
    hidden, original, mask = drawn((2, 3, 5, 7), torch.float64)
    found = rerouting_loss(hidden, original, mask)
    assert found.dtype == torch.float64
    assert relative_error(found, naive(hidden, original, mask)) < 1e-14


def test_unmoved_states_lose_one_and_are_stationary(backend, device):
    hidden, _, mask = drawn((2, 3, 5, 7), device=device)
    states = hidden.clone().requires_grad_()
    found = rerouting_loss(states, hidden, mask)
    found.backward()
    assert found.item() == pytest.approx(1.0, abs=1e-6)
    assert float(states.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("turn", ["opposite", "orthogonal"])
def test_states_turned_away_lose_nothing_and_have_no_gradient(turn, backend, device):
    original = torch.zeros(2, 3, 5, 8, device=device)
    original[..., :4] = 1.0
    states = -original if turn == "opposite" else original.flip(-1)
    states.requires_grad_()
    found = rerouting_loss(states, original, torch.ones(3, 5, dtype=torch.bool, device=device))
    found.backward()
    assert found.item() == 0.0
    assert not states.grad.any()


@pytest.mark.parametrize("scale", [1e-30, 2.0**-100, 1e5, 1e30])
def test_the_loss_depends_on_directions_alone(scale, backend, device):
    """Also where the squares of the entries underflow or overflow in float32."""
    hidden, original, mask = drawn((2, 3, 5, 7), device=device)
    expected = rerouting_loss(hidden, original, mask).item()
    assert rerouting_loss(hidden * scale, original, mask).item() == pytest.approx(expected, rel=1e-6)
    assert rerouting_loss(hidden, original * scale, mask).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("which", ["hidden", "original", "both"])
@pytest.mark.parametrize("norm", [0.0, 1e-40])
def test_a_vector_of_norm_zero_loses_nothing_and_has_no_gradient(which, norm, backend, device):
    hidden, original, mask = drawn((2, 3, 5, 7), device=device)
    mask[:] = True
    if which != "original":
        hidden[1, 2, 3] = norm
    if which != "hidden":
        original[1, 2, 3] = norm
    states = hidden.clone().requires_grad_()
    found = rerouting_loss(states, original, mask)
    found.backward()
    kept = torch.ones(2, 3, 5, dtype=torch.bool, device=device)
    kept[1, 2, 3] = False
    cosines = torch.nn.functional.cosine_similarity(hidden.double(), original.double(), dim=-1)
    assert found.item() == pytest.approx((torch.relu(cosines)[kept].sum() / kept.numel()).item(), rel=1e-5)
    assert bool(states.grad.isfinite().all())
    assert not states.grad[1, 2, 3].any()
    # A control: the formula as it stands has no answer here.
    norms = hidden.norm(dim=-1) * original.norm(dim=-1)
    assert norm != 0.0 or not bool(((hidden * original).sum(-1) / norms).isfinite().all())


def test_tokens_masked_out_play_no_part(backend, device):
    hidden, original, mask = drawn((2, 3, 5, 7), device=device)
    expected = rerouting_loss(hidden, original, mask).item()
    hidden[:, ~mask], original[:, ~mask] = torch.nan, torch.inf
    hidden.requires_grad_()
    found = rerouting_loss(hidden, original, mask)
    found.backward()
    assert found.item() == expected
    assert not hidden.grad[:, ~mask].any()
    assert bool(hidden.grad.isfinite().all())


def test_nan_in_a_token_that_counts_is_not_hidden(backend, device):
    hidden, original, mask = drawn((2, 3, 5, 7), device=device)
    hidden[1, 0, 0, 2] = torch.nan
    hidden.requires_grad_()
    found = rerouting_loss(hidden, original, mask)
    found.backward()
    assert bool(found.isnan())
    assert bool(hidden.grad[1, 0, 0].isnan().any())


def test_an_empty_mask_gives_zero_and_no_gradient(backend, device):
    hidden, original, mask = drawn((2, 3, 5, 7), device=device)
    hidden.requires_grad_()
    found = rerouting_loss(hidden, original, torch.zeros_like(mask))
    found.backward()
    assert found.item() == 0.0
    assert not hidden.grad.any()


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7)], ids=str)
def test_no_states_give_zero(shape, backend, device):
    states = torch.ones(shape, device=device, requires_grad=True)
    mask = torch.ones(shape[1:3], dtype=torch.bool, device=device)
    found = rerouting_loss(states, states, mask)
    found.backward()
    assert found.item() == 0.0
    assert states.grad.shape == shape


def test_the_original_gets_no_gradient(backend, device):
    hidden, original, mask = drawn((2, 3, 5, 7), device=device)
    rerouting_loss(hidden.requires_grad_(), original.requires_grad_(), mask).backward()
    assert original.grad is None
    assert bool(hidden.grad.any())


def test_states_in_any_layout_are_read_where_they_lie(backend, device, relative_error):
    hidden, original, mask = drawn((2, 3, 5, 7), device=device)
    turned = hidden.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert turned.stride() != hidden.stride()
    exact_states = hidden.double().requires_grad_()
    naive(exact_states, original.double(), mask).backward()
    states = turned.requires_grad_()
    rerouting_loss(states, original, mask).backward()
    assert relative_error(states.grad, exact_states.grad) < BOUND


def test_the_bound_tells_a_mean_over_all_tokens_and_a_maximum_after_it(relative_error):
    """Controls: two usual mistakes miss the bound by far."""
    hidden, original, mask = drawn((2, 3, 5, 7))
    exact = naive(hidden.double(), original.double(), mask)
    assert relative_error(naive(hidden, original, torch.ones_like(mask)), exact) > 1000 * BOUND
    cosine = torch.nn.functional.cosine_similarity(hidden, original, dim=-1)
    assert relative_error(torch.relu(cosine[:, mask].mean()), exact) > 1000 * BOUND


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(3, 4) > 0), "equal stacks"),
        ((torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 6), torch.ones(3, 4) > 0), "equal stacks"),
        ((torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5), torch.ones(3, 4)), "one bool"),
        ((torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5), torch.ones(2, 3) > 0), "one bool"),
        ((torch.ones(2, 3, 4, 5).int(), torch.ones(2, 3, 4, 5), torch.ones(3, 4) > 0), "floating point"),
    ],
    ids=["rank", "shapes", "mask-dtype", "mask-shape", "integers"],
)
def test_what_does_not_fit_is_refused(arguments, told):
    with pytest.raises(UsageError, match=told):
        inspect.unwrap(rerouting_loss)(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_agrees_on_states_of_a_real_size(dtype, monkeypatch, relative_error):
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    hidden, original, mask = drawn((2, 4, 511, 4096), dtype, "cuda")
    exact_hidden = hidden.double().requires_grad_()
    exact = naive(exact_hidden, original.double(), mask)
    exact.backward()
    found = rerouting_loss(hidden.requires_grad_(), original, mask)
    found.backward()
    assert relative_error(found, exact) < 2.0**-20
    assert relative_error(hidden.grad, exact_hidden.grad) < max(2.0**-20, HALF.get(dtype, 0.0))
