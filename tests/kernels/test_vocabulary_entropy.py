"""The entropy over a vocabulary and its gradients: both backends against the formula in float64."""

import inspect
import math

import pytest
import torch

from surgery.errors import UsageError
from surgery.kernels import vocabulary_entropy as module
from surgery.kernels import vocabulary_entropy_triton
from surgery.kernels.vocabulary_entropy import token_entropy, vocabulary_entropy

# (tokens, d, vocabulary): blocks are 32 x 64 x 64.
SHAPES = [(1, 5, 3), (7, 5, 101), (33, 64, 1000), (7, 65, 65)]
# Logits of size 10 are known to a few times 2^-24 of their size; the entropy and its gradients move as much.
BOUND = 2.0**-24 * 64
# What float32 makes of half-precision arguments is rounded once.
HALF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch):
    """Chunks and stretches so short that these small vocabularies have several, the last one ragged."""
    monkeypatch.setattr(module, "_LOGITS", 1)
    monkeypatch.setattr(module, "_LEAST", 48)
    monkeypatch.setattr(vocabulary_entropy_triton, "_STRETCH", 128)


def naive(hidden, weight):
    """The definition, term by term."""
    logs = (hidden @ weight.T).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def drawn(shape, dtype=torch.float32, device="cpu", spread=3.0):
    tokens, d, vocabulary = shape
    generator = torch.Generator().manual_seed(sum(shape))
    hidden = torch.randn(tokens, d, generator=generator) * spread / math.sqrt(d)
    weight = torch.randn(vocabulary, d, generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype)


def wide(*tensors):
    return tuple(tensor.detach().double().requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropies_and_gradients_are_those_of_the_formula(
    shape, dtype, backend, device, padded, relative_error
):
    hidden, weight = drawn(shape, dtype, device)
    exact_hidden, exact_weight = wide(hidden, weight)
    exact = naive(exact_hidden, exact_weight)
    upstream = torch.linspace(-1, 2, len(hidden), device=device)
    exact.backward(upstream.double())
    hidden, weight = padded(hidden).requires_grad_(), padded(weight).requires_grad_()
    found = token_entropy(hidden, weight)
    assert found.dtype == torch.float32
    assert relative_error(found, exact) < BOUND
    found.backward(upstream)
    bound = max(BOUND, HALF.get(dtype, 0.0))
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    assert relative_error(hidden.grad, exact_hidden.grad) < bound
    assert relative_error(weight.grad, exact_weight.grad) < bound


@pytest.mark.parametrize("shape", [(1, 5, 3), (7, 5, 101)], ids=str)
def test_the_gradient_is_the_derivative(shape):
    hidden, weight = wide(*drawn(shape))
    assert torch.autograd.gradcheck(token_entropy, (hidden, weight), fast_mode=shape[0] > 1)
    mask = torch.arange(shape[0]) % 2 == 0
    assert torch.autograd.gradcheck(lambda h, w: vocabulary_entropy(h, w, mask), (hidden, weight))


def test_float64_arguments_are_computed_in_float64(relative_error):
    hidden, weight = wide(*drawn((7, 5, 101)))
    found = token_entropy(hidden, weight)
    assert found.dtype == torch.float64
    assert relative_error(found, naive(hidden, weight)) < 1e-14


def test_equal_logits_have_the_largest_entropy_there_is(backend, device):
    hidden, weight = torch.ones(2, 5, device=device), torch.ones(101, 5, device=device)
    hidden.requires_grad_()
    found = token_entropy(hidden, weight)
    assert found.tolist() == pytest.approx([math.log(101)] * 2, rel=1e-6)
    found.sum().backward()
    assert float(hidden.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("size", [1e4, 1e6, -1e4])
def test_logits_of_any_size_are_safe(size, backend, device):
    """Half of the vocabulary shares the largest logit, the other half lies far below: the entropy is log(50)."""
    weight = torch.zeros(100, 1, device=device)
    weight[::2] = 1.0
    weight[1::2] = -1.0
    hidden = torch.full((3, 1), size, device=device, requires_grad=True)
    found = vocabulary_entropy(hidden, weight)
    assert found.item() == pytest.approx(math.log(50), rel=1e-6)
    found.backward()
    assert hidden.grad.tolist() == [[0.0]] * 3


def test_a_common_shift_of_the_logits_changes_nothing(backend, device, relative_error):
    """All logits moved by 4096, where float32 is accurate to 2^-12: exact here, logits being multiples of 2^-6."""
    hidden, weight = drawn((7, 5, 101))
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    moved = (
        torch.cat([hidden, torch.full((7, 1), 64.0)], 1),
        torch.cat([weight, torch.full((101, 1), 64.0)], 1),
    )
    found = token_entropy(*(tensor.to(device) for tensor in moved))
    assert relative_error(found.cpu(), naive(hidden.double(), weight.double())) < BOUND


def test_tokens_masked_out_play_no_part(backend, device):
    hidden, weight = drawn((7, 5, 101), device=device)
    mask = torch.tensor([True, False, True, True, False, False, True], device=device)
    expected = naive(hidden.double(), weight.double())[mask].mean().item()
    hidden[~mask] = torch.nan
    hidden.requires_grad_()
    weight.requires_grad_()
    found = vocabulary_entropy(hidden, weight, mask)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert not hidden.grad[~mask].any()
    assert bool(hidden.grad[mask].any(-1).all())
    assert bool(weight.grad.isfinite().all())


def test_no_tokens_have_no_entropy_and_no_gradient(backend, device):
    hidden, weight = (tensor.requires_grad_() for tensor in drawn((7, 5, 101), device=device))
    found = vocabulary_entropy(hidden, weight, torch.zeros(7, dtype=torch.bool, device=device))
    found.backward()
    assert found.item() == 0.0
    assert not hidden.grad.any()
    assert not weight.grad.any()


# NumPy, in which Triton is interpreted, remarks on it.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_nan_in_a_token_that_counts_is_not_hidden(backend, device):
    hidden, weight = drawn((7, 5, 101), device=device)
    hidden[3, 2] = torch.nan
    assert token_entropy(hidden, weight).isnan().tolist() == [False] * 3 + [True] + [False] * 3


def test_only_the_gradients_asked_for_are_made(backend, device):
    hidden, weight = drawn((7, 5, 101), device=device)
    vocabulary_entropy(hidden.requires_grad_(), weight).backward()
    assert weight.grad is None
    kept = hidden.grad
    hidden = hidden.detach()
    vocabulary_entropy(hidden, weight.requires_grad_()).backward()
    assert hidden.grad is None
    assert kept.shape == hidden.shape


def test_autocast_takes_no_accuracy(device, relative_error):
    hidden, weight = drawn((33, 64, 1000), device=device)
    exact_hidden, exact_weight = wide(hidden, weight)
    naive(exact_hidden, exact_weight).sum().backward()
    hidden.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        found = token_entropy(hidden, weight)
        found.sum().backward()
        # A control: autocast does reach products that are not kept from it.
        assert (hidden @ weight.T).dtype == torch.bfloat16
    assert relative_error(found, naive(exact_hidden, exact_weight)) < BOUND
    assert relative_error(hidden.grad, exact_hidden.grad) < BOUND


def test_no_matrix_of_all_logits_is_made(device, monkeypatch):
    """The widest product of the reference is a chunk."""
    monkeypatch.setenv("SURGERY_KERNELS", "torch")
    hidden, weight = drawn((7, 5, 101), device=device)
    widths = []
    multiply = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: widths.append(b.shape[1]) or multiply(a, b))
    vocabulary_entropy(hidden.requires_grad_(), weight).backward()
    assert widths == [48, 48, 5] * 2


def test_the_bound_tells_bfloat16_logits_and_a_missing_chunk(relative_error):
    """Controls: each of two usual shortcuts misses the bound by far."""
    hidden, weight = drawn((33, 64, 1000))
    exact = naive(hidden.double(), weight.double())
    rounded = naive(hidden.bfloat16(), weight.bfloat16())
    assert relative_error(rounded, exact) > 100 * BOUND
    assert relative_error(naive(hidden, weight[:-40]), exact) > 100 * BOUND


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), "neither empty"),
        ((torch.ones(2, 3), torch.ones(0, 3)), "neither empty"),
        ((torch.ones(2, 3), torch.ones(4, 3).bfloat16()), "one floating-point dtype"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(2)), "one bool a token"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3, dtype=torch.bool)), "one bool a token"),
    ],
    ids=["width", "vocabulary", "dtypes", "mask-dtype", "mask-shape"],
)
def test_what_does_not_fit_is_refused(arguments, told, monkeypatch):
    monkeypatch.setattr(module, "token_entropy", inspect.unwrap(token_entropy))
    with pytest.raises(UsageError, match=told):
        inspect.unwrap(vocabulary_entropy)(*arguments)


@pytest.mark.gpu
def test_a_gpu_computes_logits_in_float32_and_not_in_tf32(monkeypatch, relative_error):
    monkeypatch.setenv("SURGERY_KERNELS", "triton")
    hidden, weight = drawn((130, 4096, 5000), device="cuda", spread=10.0)
    exact_hidden, exact_weight = wide(hidden, weight)
    exact = naive(exact_hidden, exact_weight)
    exact.sum().backward()
    found = token_entropy(hidden.requires_grad_(), weight)
    found.sum().backward()
    assert relative_error(found, exact) < 2.0**-18
    assert relative_error(hidden.grad, exact_hidden.grad) < 2.0**-16
