"""Kernels under test: Triton interpreted where there is no GPU, outputs poisoned, inputs padded with NaN."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Read when a kernel is decorated, so set before any Triton module is imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device():
    """Where the kernels run: the GPU if there is one, otherwise the CPU, where Triton is interpreted."""
    return torch.device(DEVICE)


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Each backend in turn, asked for by name."""
    monkeypatch.setenv("SURGERY_KERNELS", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that torch hands out unwritten holds NaN: an entry that a kernel forgets shows."""

    def poisoned(make):
        def allocate(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(torch.nan) if made.is_floating_point() else made

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def padded():
    """A copy of a tensor as a view into a buffer of NaN, so that a read outside of it shows."""

    def pad(tensor):
        buffer = torch.full(
            [size + 3 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device
        )
        view = buffer[tuple(slice(1, 1 + size) for size in tensor.shape)]
        return view.copy_(tensor)

    return pad


@pytest.fixture
def relative_error():
    """RMS error of a result over the RMS of the exact float64 answer; NaN anywhere gives NaN."""

    def measure(found, exact):
        assert found.shape == exact.shape
        found, exact = found.detach().double(), exact.detach().double()
        return float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())

    return measure
