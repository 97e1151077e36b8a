"""A tiny model and made-up rows to train it on, the same in every process."""

import torch

from surgery.checkpoint.layout import open_checkpoint
from surgery.methods.booster import Booster
from surgery.methods.circuit_breakers import CircuitBreakers
from surgery.methods.condition_number import ConditionNumber
from surgery.methods.mlac import MLAC
from surgery.methods.t_vaccine import TVaccine
from surgery.methods.tar import TAR
from surgery.methods.vaccine import Vaccine
from surgery.train import network
from surgery.train.feed import Feed
from surgery.train.parking import Original
from surgery.train.sft import SFT
from surgery.train.step import Step
from surgery.train.tokens import Example
from surgery.train.training import Training

SETS = ("aligned", "harmful", "retain")
METHODS = [
    SFT(),
    Vaccine(rho=0.5),
    TVaccine(rho=0.5, gamma=1),
    CircuitBreakers(),
    Booster(),
    TAR(inner_steps=4, every=2, adversary_lr="1e-3", adversary_switch=1.0, positions="attended"),
    TAR(inner_steps=4, every=2, adversary_lr="1e-3", adversary_lora=1.0, positions="attended"),
    ConditionNumber(targets="1,2"),
    MLAC(inner_steps=3, inner_lr=1e-3, first_order=True),
]
"""Every method once (TAR by either kind of attacker), with options that show on a tiny model in a few steps."""


def rows(count=24, vocabulary=128, seed=0):
    """Rows of 5 to 17 tokens, a third of each the prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 18, (count,), generator=generator).tolist()
    return tuple(
        Example(tuple(torch.randint(2, vocabulary, (length,), generator=generator).tolist()), length // 3)
        for length in lengths
    )


def examples():
    return {name: rows(seed=number) for number, name in enumerate(SETS)}


def trainable(folder, method, training, seed=0, noise=0.05):
    """The model of a folder with its adapter, whose B factors are not zero, so that every factor has a gradient."""
    model = network.load_model(open_checkpoint(folder, folder.name), torch.float32)
    model = network.make_trainable(model, method, training, label=folder.name, seed=seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in network.carried(model).items():
            if "lora_B" in name:
                weight.copy_(noise * torch.randn(weight.shape, generator=generator))
    return model


def gradients(model, method, training, crew, number=0, seed=0):
    """Every gradient of one step in one vector, as the loop would have it before clipping; None counts as zero."""
    sets = {name: rows for name, rows in examples().items() if name in method.sets()}
    feed = Feed(
        method.streams(sets, seed),
        training.batch_size,
        training.gradient_accumulation,
        seed,
        0,
        crew.device,
        crew.rank,
        crew.world,
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = None
    model.train()
    step = Step(
        number, training.steps, seed, crew.backward, crew.summed, crew.add_gradients, original=Original(model)
    )
    method.backward(model, feed.step(number), step)
    crew.add_gradients(weights)
    found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    return torch.cat([network.whole(part).flatten() for part in found])


def plain(**changes):
    """Training without anything random beside the data."""
    usual = {"steps": 6, "batch_size": 8, "lora_rank": 4, "lora_alpha": 8.0, "checkpoint_every": 2}
    return Training(**{**usual, **changes})
