"""Bases of the evidence study under which LoX has an alpha for each layer, or spares innocent inputs."""

import pytest
import torch

from benchmarks.evidence import bases

NAMES = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)]
HEAD = "lm_head.weight"


@pytest.fixture
def pair():
    """A base and an aligned model of five layers and a head, bf16."""
    source = torch.Generator().manual_seed(5)

    def tensors():
        return {name: torch.randn(12, 8, generator=source).bfloat16() for name in (*NAMES, HEAD)}

    return tensors(), tensors()


def test_a_tapered_base_gives_each_layer_its_own_alpha(pair):
    base, aligned = pair
    made = bases.tapered(base, aligned, [2.0, 0.0, 1.0])
    for name, weight in zip(NAMES, (2.0, 1.0, 0.0, 0.5, 1.0), strict=True):
        delta = aligned[name].double() - base[name].double()
        found = aligned[name].double() - made[name].double()
        torch.testing.assert_close(found, weight * delta, rtol=0, atol=1e-6)
    torch.testing.assert_close(made[HEAD], base[HEAD].float())


def test_of_one_weight_the_base_is_the_old_one_times_it(pair):
    base, aligned = pair
    made = bases.tapered(base, aligned, [1.0])
    for name in (*NAMES, HEAD):
        torch.testing.assert_close(made[name], base[name].float(), rtol=0, atol=1e-6)


def test_a_cleaned_delta_does_nothing_to_the_inputs_it_spares_and_all_it_did_to_others(pair):
    base, aligned = pair
    spanned = torch.randn(3, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    others = torch.linalg.svd(spanned)[2][3:]
    made = bases.cleaned(base, aligned, {NAMES[0]: spanned.T @ spanned}, 1 - 1e-9)
    left = aligned[NAMES[0]].double() - made[NAMES[0]].double()
    before = aligned[NAMES[0]].double() - base[NAMES[0]].double()
    assert (left @ spanned.T).abs().max() < 1e-5
    torch.testing.assert_close(left @ others.T, before @ others.T, rtol=0, atol=1e-5)
    assert (before @ spanned.T).abs().max() > 1  # else the first line would say nothing
    for name in (*NAMES[1:], HEAD):
        torch.testing.assert_close(made[name], aligned[name].float())
