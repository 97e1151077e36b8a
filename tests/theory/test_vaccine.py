"""What must be true of Vaccine, whatever its code."""

import math
import warnings
from contextlib import nullcontext
from itertools import chain

import pytest
import torch
from objectives import adapted, apart, batch, flat, gradients, hooks, model_of, split, widened

from surgery.errors import UsageError
from surgery.methods.vaccine import Vaccine
from surgery.train import blocks, perturb, worst_case
from surgery.train.losses import answer_loss, answered_count
from surgery.train.step import Step


def data(*batches):
    return {"aligned": list(batches)}


def attention_gradients(model, batches):
    """dL/de_l of every attention output, micro-batch by micro-batch, from the outputs themselves."""
    count = answered_count(batches, Step(0, 1))
    found = []
    for one in batches:
        outputs = []

        def keep(module, args, output, outputs=outputs):
            outputs.append(output[0])
            output[0].retain_grad()

        handles = [module.register_forward_hook(keep) for module in blocks.find(model).attention]
        answer_loss(model, one, count=count).backward()
        for handle in handles:
            handle.remove()
        found.append([output.grad for output in outputs])
    model.zero_grad()
    return found


@pytest.fixture
def added(monkeypatch):
    """What was added to the attention outputs, micro-batch by micro-batch."""
    seen = []

    def spying(modules, addends):
        seen.append(list(addends))
        return perturb_with(modules, addends)

    perturb_with = perturb.perturbed
    monkeypatch.setattr(perturb, "perturbed", spying)
    return seen


def norm(tensors):
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize("rho", [0.01, 2.0])
def test_the_perturbation_has_norm_rho_over_all_layers_and_micro_batches_together(added, rho):
    model, batches = adapted(), [batch(1), batch(2, rows=2)]
    gradients(Vaccine(rho=rho), model, data(*batches))
    assert norm(chain(*added)) == pytest.approx(rho, rel=1e-5)
    assert norm(added[0]) < 0.95 * rho  # control: one micro-batch, or one layer, does not have it
    assert norm(added[0][:1]) < 0.9 * rho


def test_the_perturbation_of_every_layer_is_the_same_multiple_of_its_gradient(added):
    model, batches = adapted(), [batch(1), batch(2, rows=2)]
    gradients(Vaccine(rho=2.0), model, data(*batches))
    expected = attention_gradients(model, batches)
    ratio = 2.0 / norm(chain(*expected))
    for addends, by_layer in zip(added, expected, strict=True):
        assert len(addends) == 4
        for addend, gradient in zip(addends, by_layer, strict=True):
            torch.testing.assert_close(addend, ratio * gradient, rtol=1e-4, atol=1e-7)
    by_layer = [norm(gradient) for gradient in zip(*expected, strict=True)]
    assert max(by_layer) > 1.1 * min(
        by_layer
    )  # control: a norm of its own for every layer would be another method


def test_the_loss_rises_by_rho_times_the_gradient_norm_to_first_order():
    model, batches = adapted(), [batch(1)]
    terms, _ = gradients(Vaccine(rho=1e-2), model, data(*batches))
    rise, first = terms["loss"] - terms["unperturbed"], 1e-2 * terms["output_gradient"]
    assert rise == pytest.approx(first, rel=1e-2)
    nearer, _ = gradients(Vaccine(rho=2e-3), model, data(*batches))
    assert abs(nearer["loss"] - nearer["unperturbed"] - first / 5) < 0.1 * abs(
        rise - first
    )  # the rest is O(rho^2)
    source = torch.Generator().manual_seed(3)
    noise = [torch.randn(part.shape, generator=source) for part in attention_gradients(model, batches)[0]]
    scale = 1e-2 / norm(noise)
    with perturb.perturbed(blocks.find(model).attention, [scale * part for part in noise]), torch.no_grad():
        loss = answer_loss(model, batches[0], count=answered_count(batches, Step(0, 1)))
    assert abs(float(loss) - terms["unperturbed"]) < 0.1 * rise  # control: a random direction


def test_rho_zero_gives_the_gradient_of_plain_training_bit_for_bit():
    model, one = adapted(), batch(1)
    terms, found = gradients(Vaccine(rho=0.0), model, data(one))
    model.zero_grad()
    answer_loss(model, one, count=answered_count([one], Step(0, 1))).backward()
    assert terms["loss"] == terms["unperturbed"]
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(found[name], weight.grad)
    _, other = gradients(Vaccine(rho=2.0), model, data(one))
    assert apart(other, found) > 0.05  # control


def test_the_gradient_is_that_of_a_network_with_constant_added_biases():
    model, one = adapted(), batch(1)
    _, found = gradients(Vaccine(rho=2.0), model, data(one))
    [by_layer] = attention_gradients(model, [one])
    scale = 2.0 / norm(by_layer)
    constants = {
        id(module): (scale * part).detach()
        for module, part in zip(blocks.find(model).attention, by_layer, strict=True)
    }

    def bias(module, args, output):
        return (output[0] + constants[id(module)], *output[1:])

    handles = [module.register_forward_hook(bias) for module in blocks.find(model).attention]
    model.zero_grad()
    answer_loss(model, one, count=answered_count([one], Step(0, 1))).backward()
    for handle in handles:
        handle.remove()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert apart(found, expected) < 1e-4
    _, plain = gradients(Vaccine(rho=0.0), model, data(one))
    assert apart(plain, expected) > 0.05  # control


def test_a_step_leaves_no_hooks_behind_and_no_weight_changed():
    model = adapted()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    needing = [weight.requires_grad for weight in model.parameters()]
    clean = hooks(model)
    gradients(Vaccine(), model, data(batch(1), batch(2)))
    assert hooks(model) == clean
    assert [weight.requires_grad for weight in model.parameters()] == needing
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    with perturb.probed(blocks.find(model).attention):
        assert hooks(model) == clean + 4  # control: they would be seen


def test_a_step_that_fails_leaves_no_hooks_behind():
    model, broken = adapted(), batch(1)
    needing, clean = [weight.requires_grad for weight in model.parameters()], hooks(model)

    def refuse(loss):
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Vaccine().backward(model, data(broken), Step(0, 10, backward=refuse))
    assert hooks(model) == clean
    assert [weight.requires_grad for weight in model.parameters()] == needing


def test_the_first_pass_forms_no_gradient_of_any_weight():
    model, one = model_of(), batch(1)
    worst_case.output_gradients(model, one, blocks.find(model).attention, 10)
    assert all(weight.grad is None for weight in model.parameters())
    answer_loss(model, one, count=10).backward()
    assert all(weight.grad is not None for weight in model.parameters())  # control


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 1, 1, 1)], ids=str)
def test_micro_batches_do_not_change_the_gradient(sizes):
    model, whole = adapted(), batch(1, rows=4, padding=(4, 0, 2, 6))
    terms, expected = gradients(Vaccine(), model, data(whole))
    split_terms, found = gradients(Vaccine(), model, data(*split(whole, *sizes)))
    assert apart(found, expected) < 1e-4
    assert split_terms == pytest.approx(terms, rel=1e-5)


def test_a_norm_for_each_micro_batch_would_be_another_method():
    """The control of the test above."""
    model, whole = adapted(), batch(1, rows=4, padding=(4, 0, 2, 6))
    _, expected = gradients(Vaccine(), model, data(whole))
    parts = split(whole, 2, 2)
    counts = [answered_count([part], Step(0, 1)) for part in parts]
    model.zero_grad()
    for part, count in zip(parts, counts, strict=True):
        share = count / sum(counts)
        Vaccine().backward(
            model, data(part), Step(0, 10, backward=lambda loss, s=share: (s * loss).backward())
        )
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert apart(found, expected) > 0.02


def test_processes_share_one_norm():
    """A sum over processes that doubles everything stands for a second process with the same rows."""
    model, one = adapted(), batch(1)
    _, expected = gradients(Vaccine(), model, data(one, one))
    _, found = gradients(Vaccine(), model, data(one), Step(0, 10, summed=lambda tensor: 2 * tensor))
    assert apart({name: 2 * part for name, part in found.items()}, expected) < 1e-4
    _, alone = gradients(Vaccine(), model, data(one))
    assert apart(alone, expected) > 0.01  # control


def test_both_passes_use_the_same_dropout_masks(monkeypatch):
    model, batches = adapted(dropout=0.5), [batch(1), batch(2)]
    terms, _ = gradients(Vaccine(rho=0.0), model, data(*batches))
    assert terms["loss"] == terms["unperturbed"]
    monkeypatch.setattr(perturb, "replayed", lambda state: nullcontext())
    terms, _ = gradients(Vaccine(rho=0.0), model, data(*batches))
    assert terms["loss"] != terms["unperturbed"]  # control


def test_padding_enters_neither_loss_nor_norm_nor_perturbation(added):
    model, one = adapted(), batch(1)
    terms, expected = gradients(Vaccine(), model, data(one))
    wide_terms, found = gradients(Vaccine(), model, data(widened(one, 5)))
    assert wide_terms == pytest.approx(terms, rel=1e-5)
    assert apart(found, expected) < 1e-4
    assert all(float(part[~one.attended].abs().max()) == 0 for part in added[0])
    changed = batch(1)
    changed.tokens[0, 6] = (changed.tokens[0, 6] + 1) % 60
    assert gradients(Vaccine(), model, data(changed))[0]["loss"] != pytest.approx(
        terms["loss"], rel=1e-5
    )  # control


def test_gradient_checkpointing_does_not_change_the_gradient():
    model, one = adapted(dropout=0.3), batch(1)
    torch.manual_seed(5)
    terms, expected = gradients(Vaccine(), model, data(one))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    handle = blocks.find(model).attention[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    again, found = gradients(Vaccine(), model, data(one))
    handle.remove()
    assert len(calls) == 4  # control: two passes, each done again
    assert again == pytest.approx(terms, rel=1e-6)
    assert apart(found, expected) < 1e-6


@pytest.mark.parametrize("rho", [-1.0, math.nan, math.inf])
def test_a_norm_that_is_none_is_refused(rho):
    with pytest.raises(UsageError, match="rho"):
        Vaccine(rho=rho)


def test_all_weights_can_be_trained():
    model = model_of()
    _, found = gradients(Vaccine(), model, data(batch(1)))
    assert all(gradient is not None for gradient in found.values())
    assert flat(found).isfinite().all()


def test_both_forms_are_one():
    model = adapted()
    one, two = (
        gradients(Vaccine(rho=0.5, form=form), model, data(batch(1)))[1] for form in ("paper", "tutorial")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
