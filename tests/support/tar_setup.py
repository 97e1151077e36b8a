"""TAR on a small model, for tests."""

from objectives import batch, gradients

from surgery.methods.tar import TAR
from surgery.train.parking import Original
from surgery.train.step import Step

RATE = 1e-2


def tar(**changes):
    usual = {
        "inner_steps": 4, "every": 2, "adversary_lr": str(RATE), "adversary_switch": 0.0, "positions": "attended",
    }  # fmt: skip
    return TAR(**{**usual, **changes})


def data(method, seed=0):
    count = method.inner_steps * method.attacks
    return {
        "attack": [batch(seed + 100 + number) for number in range(count)],
        "attack_retain": [batch(seed + 200 + number) for number in range(count)],
        "held_out": [batch(seed + 300 + number) for number in range(method.attacks)],
        "preferred": [batch(seed + 400 + number) for number in range(method.attacks)],
        "retain": [batch(seed + 500)],
    }


def step_of(model, number=0, **changes):
    return Step(number, 10, original=Original(model), **changes)


def found(method, model, batches=None, number=0):
    return gradients(method, model, batches or data(method), step_of(model, number))


def entropy_gradient(model, rows):
    """Minus the mean entropy over attended positions from whole logits in float64, and its gradient."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=rows.tokens, attention_mask=rows.attended).logits.double()
    logs = logits.log_softmax(-1)
    loss = (logs.exp() * logs).sum(-1)[rows.attended].mean()
    loss.backward()
    gradient = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradient
