"""What must be true of RepNoise, whatever its code."""

import math
from dataclasses import replace

import pytest
import torch
from objectives import adapted, apart, batch, gradients, hooks, model_of, split, widened

from surgery.errors import InputError, UsageError
from surgery.methods import repnoise
from surgery.methods.repnoise import RepNoise, differing
from surgery.train import blocks, coupled, perturb
from surgery.train.discrepancy import mmd
from surgery.train.lens import lens_loss
from surgery.train.losses import answer_loss, answered_count
from surgery.train.seeding import seeded
from surgery.train.step import Step
from surgery.train.tokens import Example

STEP = Step(0, 10)
STRONG = RepNoise(alpha=1.5, beta=20.0)


def sample(rows, width=6, *, seed=0, shift=0.0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=source, dtype=torch.float64) + shift


def data(rows=3):
    """Pairs of answers to the same prompts, of other lengths."""
    harmless, harmful = batch(1, rows=rows), batch(2, rows=rows, length=16, padding=(0, 3, 1))
    harmful.tokens[:, :5] = harmless.tokens[:, :5]
    return {"aligned": [harmless], "harmful": [harmful]}


# The discrepancy.


def test_it_is_zero_between_a_sample_and_itself_symmetric_and_above_zero_when_shifted():
    one, other = sample(7), sample(5, seed=1)
    assert float(mmd(one, one)) == pytest.approx(0, abs=1e-14)
    assert float(mmd(one, other)) == pytest.approx(float(mmd(other, one)), rel=1e-12)
    assert float(mmd(one, one + 1.0)) > 0.1
    assert float(mmd(one, other + 5)) > float(mmd(one, other)) > 0
    assert float(mmd(one * 0, one[:3] * 0)) == 0


def test_it_is_the_sum_of_five_gaussian_kernels():
    one, other = sample(4), sample(3, seed=1, shift=0.4)
    both = torch.cat([one, other])
    distances = torch.cdist(both, both).square()
    mean = distances.sum() / 42
    kernels = sum(torch.exp(-distances / (mean * share)) for share in (0.25, 0.5, 1, 2, 4))
    wanted = kernels[:4, :4].mean() + kernels[4:, 4:].mean() - 2 * kernels[:4, 4:].mean()
    assert float(mmd(one, other)) == pytest.approx(float(wanted), rel=1e-10)


def test_its_widths_count_as_constants():
    """Scaling both samples changes nothing; if the widths had a derivative, the derivative along that were zero."""
    one, other = sample(4).requires_grad_(), sample(3, seed=1, shift=0.4).requires_grad_()
    assert float(mmd(3 * one, 3 * other).detach()) == pytest.approx(
        float(mmd(one, other).detach()), rel=1e-10
    )
    pulls = torch.autograd.grad(mmd(one, other), (one, other))
    assert (
        abs(sum(float((pull * part).sum().detach()) for pull, part in zip(pulls, (one, other), strict=True)))
        > 0.01
    )


# What counts.


def test_positions_count_where_answers_differ_or_one_has_ended():
    one, other = (batch(1, rows=1, length=9, padding=(2,), prompt=3) for _ in range(2))
    other = replace(other, tokens=other.tokens.clone())
    other.tokens[0, 4] += 1
    first, second = differing(one, other)
    assert first.answered.nonzero().tolist() == second.answered.nonzero().tolist() == [[0, 4]]
    longer = widened(one, 3)
    longer.attended[0, 7:9] = longer.answered[0, 7:9] = True
    first, second = differing(one, longer)
    assert not first.answered.any()
    assert second.answered[0].nonzero().flatten().tolist() == [7, 8]


def test_a_token_with_the_id_zero_counts():
    one, other = (batch(1, rows=1, length=9, padding=(0,), prompt=3) for _ in range(2))
    other = replace(other, tokens=other.tokens.clone())
    other.tokens[0, 4] = 0
    assert differing(one, other)[1].answered[0, 4]


def test_equal_answers_give_nothing_and_no_nan():
    rows = batch(1)
    model = adapted()
    terms, found = gradients(STRONG, model, {"aligned": [rows], "harmful": [rows]})
    assert all(math.isfinite(value) for value in terms.values())
    assert terms["harmless"] == terms["harmful"] == 0
    assert all(part is None or not part.any() for part in found.values())


def test_pairs_are_of_one_prompt():
    rows = {
        "aligned": [Example((1, 2, 3), 2), Example((4, 5, 6), 2)],
        "harmful": [Example((4, 5, 7, 8), 2), Example((9, 9, 9), 2)],
    }
    streams = RepNoise().streams(rows, 0)
    assert list(streams["aligned"].rows) == [rows["aligned"][1]]
    assert list(streams["harmful"].rows) == [rows["harmful"][0]]
    assert streams["harmful"].order == "aligned"
    with pytest.raises(InputError, match="both answers to one prompt"):
        RepNoise().streams({**rows, "harmful": rows["harmful"][1:]}, 0)


# The loss.


def direct(method, model, rows):
    """The loss in one graph, from what transformers gives."""
    harmless, harmful = differing(rows["aligned"][0], rows["harmful"][0])
    found = blocks.find(model)
    kept = answer_loss(model, harmless, count=answered_count([harmless], STEP))
    with perturb.outputs([parts[-1] for parts in found.mlp]) as put_out:
        out = model(input_ids=harmful.tokens, attention_mask=harmful.attended, output_hidden_states=True)
    inner = blocks.unwrapped(model)
    answered, states = harmful.answered[:, 1:], out.hidden_states
    lenses = [
        torch.nn.functional.cross_entropy(
            inner.get_output_embeddings()(found.final_norm(state) if index < len(states) - 1 else state)[
                :, :-1
            ][answered],
            harmful.tokens[:, 1:][answered],
        )
        for index, state in enumerate(states)
    ]
    raised = torch.stack(lenses).mean()
    parts = []
    for layer, state in enumerate(put_out.values()):
        source = torch.Generator().manual_seed(seeded(0, 0, layer, "noise"))
        noise = torch.randn(state.shape, generator=source, dtype=torch.float64)
        mask = harmful.answered[..., None]
        parts.append(mmd((state * mask).flatten(1), (noise * mask).flatten(1)))
    return kept + method.beta * torch.stack(parts).mean() - method.alpha * torch.log1p(raised)


def exact(method, model, rows):
    model.zero_grad(set_to_none=True)
    loss = direct(method, model, rows)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


@pytest.mark.parametrize("sizes", [(3,), (1, 2), (1, 1, 1)])
def test_it_is_the_gradient_of_the_whole_step_however_it_is_split(sizes):
    model, rows = adapted(dtype=torch.float64), data()
    loss, wanted = exact(STRONG, model, rows)
    terms, found = gradients(STRONG, model, {name: split(whole[0], *sizes) for name, whole in rows.items()})
    assert terms["loss"] == pytest.approx(loss, rel=1e-9)
    assert apart(found, wanted) < 1e-7
    for off in (RepNoise(alpha=1.5, beta=0.0), RepNoise(alpha=0.0, beta=20.0)):
        assert apart(found, gradients(off, model, rows)[1]) > 0.01  # controls: either term counts


def test_micro_batches_apart_would_be_another_loss():
    model, rows = adapted(dtype=torch.float64), data()
    wanted = exact(STRONG, model, rows)[1]
    parts = {name: split(whole[0], 1, 2) for name, whole in rows.items()}
    each = [
        gradients(STRONG, model, {name: [own[place]] for name, own in parts.items()})[1] for place in (0, 1)
    ]
    mean = {name: (each[0][name] + each[1][name]) / 2 for name in wanted}
    assert apart(mean, wanted) > 0.05


def test_the_ascent_is_damped_by_the_loss_itself():
    model, rows = adapted(dtype=torch.float64), data()
    plain = gradients(RepNoise(alpha=0.0, beta=0.0), model, rows)[1]
    terms, found = gradients(RepNoise(alpha=2.0, beta=0.0), model, rows)
    harmful = differing(rows["aligned"][0], rows["harmful"][0])[1]
    model.zero_grad(set_to_none=True)
    lens_loss(model, harmful, count=answered_count([harmful], STEP)).backward()
    raised = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    share = -2.0 / (1 + terms["harmful"])
    wanted = {name: plain[name] + share * raised[name] for name in plain}
    assert apart(found, wanted) < 1e-7  # the model's norms are in float32
    assert -math.log1p(2 * terms["harmful"]) < -math.log1p(terms["harmful"])


def test_switched_off_it_is_plain_training_where_answers_differ():
    model, rows = adapted(), data()
    terms, found = gradients(RepNoise(alpha=0.0, beta=0.0), model, rows)
    harmless, _ = differing(rows["aligned"][0], rows["harmful"][0])
    model.zero_grad(set_to_none=True)
    answer_loss(model, harmless, count=answered_count([harmless], STEP)).backward()
    plain = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert apart(found, plain) < 1e-6
    assert terms["loss"] == terms["harmless"]


def test_nothing_stays_behind():
    model = adapted()
    before = hooks(model)
    for _ in range(3):
        gradients(STRONG, model, data())
        assert hooks(model) == before


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "opt", "mixtral"])
def test_other_architectures(architecture):
    terms, found = gradients(STRONG, adapted(architecture), data())
    assert all(math.isfinite(value) for value in terms.values())
    assert any(part is not None and part.any() for part in found.values())


def test_options_and_processes_are_checked():
    with pytest.raises(UsageError, match="alpha is -1"):
        RepNoise(alpha=-1.0)
    with pytest.raises(UsageError, match="one process"):
        gradients(RepNoise(), model_of(), data(), Step(0, 10, summed=lambda tensor: 2 * tensor))
    assert repnoise.RepNoise().sets() == ("aligned", "harmful")


def test_one_micro_batch_is_run_once_and_several_twice():
    runs = []

    def run(part):
        runs.append(part)
        leaf = torch.ones(2, requires_grad=True)
        return leaf.sum(), [leaf]

    def couple(given):
        return [[torch.zeros(2)] for _ in given]

    for count, wanted in ((1, 1), (3, 6)):
        runs.clear()
        coupled.backward([batch(0)] * count, run, couple, STEP)
        assert len(runs) == wanted
