"""Where models keep their blocks: every architecture that the trained methods are meant for."""

import pytest
import torch
from objectives import ARCHITECTURES, adapted, apart, batch, gradients, hooks, model_of
from torch import nn

from surgery.errors import InputError
from surgery.methods.circuit_breakers import CircuitBreakers
from surgery.methods.t_vaccine import TVaccine
from surgery.methods.vaccine import Vaccine
from surgery.train import blocks, perturb
from surgery.train.recompute import thrifty
from surgery.train.step import Step

# Parts of a block by the end of their names: attention, feed-forward; and how many linear modules a block has.
EXPECTED = {
    "llama": ("self_attn", ["mlp"], "norm", 7),
    "qwen2": ("self_attn", ["mlp"], "norm", 7),
    "qwen3": ("self_attn", ["mlp"], "norm", 7),
    "gemma2": ("self_attn", ["mlp"], "norm", 7),
    "gemma3_text": ("self_attn", ["mlp"], "norm", 7),
    "mistral": ("self_attn", ["mlp"], "norm", 7),
    "gpt2": ("attn", ["mlp"], "ln_f", 4),
    "opt": ("self_attn", ["fc1", "fc2"], "final_layer_norm", 6),
    "gpt_neox": ("attention", ["mlp"], "final_layer_norm", 4),
    "gpt_neo": ("attn", ["mlp"], "ln_f", 6),
    "mixtral": ("self_attn", ["mlp"], "norm", 4),
    "qwen2_moe": ("self_attn", ["mlp"], "norm", 7),
    "qwen3_moe": ("self_attn", ["mlp"], "norm", 4),
}


def name_of(module, model):
    return next(name for name, other in model.named_modules() if other is module).rpartition(".")[2]


def test_every_architecture_has_an_expectation():
    assert EXPECTED.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_are_found_and_are_those_expected(architecture):
    model = model_of(architecture)
    found = blocks.find(model)
    attention, mlp, norm, linear = EXPECTED[architecture]
    assert len(found.layers) == len(found.attention) == len(found.mlp) == 4
    assert found.embeddings is model.get_input_embeddings()
    assert found.hidden_size == 32
    assert name_of(found.final_norm, model) == norm
    for index, layer in enumerate(found.layers):
        assert getattr(found.stack, found.list_name)[index] is layer
        assert name_of(found.attention[index], layer) == attention
        assert [name_of(part, layer) for part in found.mlp[index]] == mlp
    names = blocks.linear_names(model, range(1, 3))
    assert len(names) == 2 * linear
    assert {name.split(f".{found.list_name}.")[1].split(".")[0] for name in names} == {"1", "2"}
    assert all(model.get_submodule(name) is not None for name in names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_outputs_and_hidden_states_are_what_they_should_be(architecture):
    """Adding to the last block's attention output changes the logits; hidden states end with the final norm."""
    model, one = model_of(architecture).eval(), batch(1)
    found = blocks.find(model)
    with torch.no_grad():
        plain = model(input_ids=one.tokens, attention_mask=one.attended, output_hidden_states=True)
        with perturb.recorded(found.layers, found.final_norm) as states:
            model(input_ids=one.tokens, attention_mask=one.attended)
        noise = torch.randn(3, 13, 32)
        with perturb.perturbed(found.attention[-1:], [noise]):
            other = model(input_ids=one.tokens, attention_mask=one.attended).logits
        with perturb.perturbed(found.attention[-1:], [0 * noise]):
            same = model(input_ids=one.tokens, attention_mask=one.attended).logits
    assert len(states) == len(plain.hidden_states)
    for ours, theirs in zip(states, plain.hidden_states, strict=True):
        torch.testing.assert_close(ours[one.attended], theirs[one.attended])
    assert (other - plain.logits)[one.attended].abs().amax(-1).min() > 1e-6
    torch.testing.assert_close(same[one.attended], plain.logits[one.attended])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_three_methods_take_a_step(architecture):
    model = adapted(architecture)
    data = {"aligned": [batch(1)], "harmful": [batch(2)], "retain": [batch(3)]}
    clean = hooks(model)
    for method in (Vaccine(rho=0.1), TVaccine(gamma=2, rho=0.1), CircuitBreakers()):
        method.prepare(model)
        terms, found = gradients(method, model, data)
        assert all(value == value for value in terms.values())
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in found.values())
        if "output_gradient" in terms:  # the worst direction is uphill
            assert terms["loss"] > terms["unperturbed"]
    assert hooks(model) == clean


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_that_keep_little_give_the_same_gradient(architecture):
    model, one = adapted(architecture, dropout=0.2), {"aligned": [batch(1)]}
    torch.manual_seed(1)
    _, expected = gradients(Vaccine(), model, one)
    calls = []
    handle = blocks.find(model).mlp[1][0].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(1)
    with thrifty(blocks.find(model).layers):
        _, found = gradients(Vaccine(), model, one)
    handle.remove()
    assert apart(found, expected) < 1e-6
    assert "forward" not in vars(blocks.find(model).layers[0])
    assert len(calls) >= 2


def test_the_parts_are_found_inside_wrappers():
    model = adapted()
    inner = blocks.find(model.get_base_model())
    assert blocks.find(model).layers == inner.layers
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert blocks.find(wrapped).attention == inner.attention
        assert blocks.unwrapped(wrapped) is model.get_base_model()
    finally:
        torch.distributed.destroy_process_group()


def test_a_shortened_model_is_whole_again_afterwards():
    model, one = model_of(), batch(1)
    found = blocks.find(model)
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        whole = model(input_ids=one.tokens).logits
        with blocks.shortened(found, 2):
            assert not torch.equal(model(input_ids=one.tokens).logits, whole)
        assert torch.equal(model(input_ids=one.tokens).logits, whole)
    assert [name for name, _ in model.named_parameters()] == names


def test_what_has_no_blocks_is_refused_by_name():
    with pytest.raises(InputError, match="Linear has no config"):
        blocks.find(nn.Linear(3, 3))
    model = model_of()
    model.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="0 lists of 5 blocks"):
        blocks.find(model)


def test_a_block_without_one_attention_is_refused_by_name():
    class Recurrence(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(32, 32)

    model = model_of()
    blocks.find(model)  # control
    blocks.find(model).layers[2].self_attn = Recurrence()
    with pytest.raises(InputError, match=r"block 2 of LlamaForCausalLM has 0 attention.*Recurrence"):
        blocks.find(model)


def test_an_attention_that_returns_no_hidden_states_is_refused():
    model, one = model_of(), batch(1)
    layer = nn.Linear(3, 3)
    with pytest.raises(InputError, match="Linear returned no hidden states"), perturb.probed([layer]):
        layer(torch.ones(3))
    with perturb.probed(blocks.find(model).attention) as probes:
        model(input_ids=one.tokens)
    assert len(probes) == 4  # control


def test_no_linear_module_is_an_error():
    with pytest.raises(InputError, match="no linear module"):
        blocks.linear_names(model_of(), range(0))


def test_random_numbers_are_played_again_and_then_go_on():
    state = perturb.randomness()
    first = torch.rand(3)
    with perturb.replayed(state):
        again = torch.rand(3)
    after = torch.rand(3)
    torch.set_rng_state(state[0])
    torch.rand(3)
    assert torch.equal(first, again)
    assert torch.equal(after, torch.rand(3))
    assert not torch.equal(first, after)  # control


def test_modules_keep_the_mode_they_had():
    model = model_of()
    model.model.layers[1].eval()
    with perturb.evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.layers[1].training
    assert model.model.layers[2].training


def test_only_what_needed_a_gradient_needs_one_again():
    model = adapted()
    needing = [weight.requires_grad for weight in model.parameters()]
    with perturb.frozen(list(model.parameters())):
        assert not any(weight.requires_grad for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == needing
    assert 0 < sum(needing) < len(needing)  # control


def test_the_joint_norm_is_that_of_one_long_vector():
    parts = [[torch.randn(3, 4), torch.randn(5)], [torch.randn(2, 2)]]
    whole = torch.cat([part.flatten() for batch in parts for part in batch]).double()
    assert float(perturb.joint_norm(parts, Step(0, 1))) == pytest.approx(float(whole.norm()), rel=1e-6)
    half = [[part.bfloat16() for part in batch] for batch in parts]
    assert float(perturb.joint_norm(half, Step(0, 1))) == pytest.approx(float(whole.norm()), rel=1e-2)
    large = [[torch.full((4,), 3e4, dtype=torch.float16)]]
    assert float(perturb.joint_norm(large, Step(0, 1))) == pytest.approx(
        6e4, rel=1e-3
    )  # overflows in float16
