"""The attacker by which a censored encoder is judged: fine-tuning on few examples, with the best settings there are.

Learning rate, steps, batch size and whether the encoder is frozen are searched by a tree-structured Parzen estimator
(Bergstra, Bardenet, Bengio, Kégl: "Algorithms for hyper-parameter optimization", 2011; of Optuna), always from a new
head. The settings with the highest accuracy on held-out examples, the worst case for the defender, are then run
several times from other seeds.

Henderson, Mitchell, Manning, Jurafsky, Finn: "Self-Destructing Models", AIES 2023, https://arxiv.org/abs/2211.14946.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from surgery.censor.examples import Examples
from surgery.censor.model import TwoTasks, head
from surgery.errors import UsageError
from surgery.train.seeding import seeded


@dataclass(frozen=True)
class Settings:
    """How an attacker trains.

    Attributes:
        rate: Learning rate of Adam.
        steps: How many.
        batch_size: Examples a step; all of them if there are fewer.
        frozen: Whether the head alone is trained.
    """

    rate: float
    steps: int
    batch_size: int
    frozen: bool


@dataclass(frozen=True)
class Search:
    """What an attacker looks for settings in; the defaults are the paper's.

    Attributes:
        trials: Settings tried at most.
        patience: Trials in a row without a better one after which the search ends.
        runs: Runs with the best settings, from other seeds.
        rates: Range of the learning rate, searched by its logarithm.
        steps: Range of the number of steps.
        batch_sizes: Batch sizes.
        frozen: Whether to freeze the encoder, not to, or either.
    """

    trials: int = 50
    patience: int = 15
    runs: int = 15
    rates: tuple[float, float] = (1e-5, 1e-2)
    steps: tuple[int, int] = (100, 1000)
    batch_sizes: tuple[int, ...] = (12, 24, 48)
    frozen: tuple[bool, ...] = (True, False)

    def __post_init__(self) -> None:
        for option in ("trials", "patience", "runs"):
            if getattr(self, option) < 1:
                raise UsageError(f"{option} is {getattr(self, option)}; it must be at least 1")
        for option in ("rates", "steps"):
            low, high = getattr(self, option)
            if not 0 < low <= high:
                raise UsageError(f"{option} is {low} to {high}; it must rise from above 0")
        for option in ("batch_sizes", "frozen"):
            if not getattr(self, option):
                raise UsageError(f"{option} is empty; it must list at least one")


@dataclass(frozen=True)
class Trial:
    """Settings, and the share of held-out examples that an attack with them gets right."""

    settings: Settings
    accuracy: float


@dataclass(frozen=True)
class Assault:
    """What an attacker reaches.

    Attributes:
        examples: How many it learned from.
        trials: What it tried, in order.
        best: The most accurate trial.
        accuracies: Of the runs with the best settings.
    """

    examples: int
    trials: tuple[Trial, ...]
    best: Trial
    accuracies: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """The mean over those runs."""
        return fmean(self.accuracies)


def search(
    model: TwoTasks,
    known: Examples,
    held_out: Examples,
    space: Search,
    *,
    tested: Examples | None = None,
    seed: int = 0,
) -> Assault:
    """The most that an attacker gets out of these examples; the model is not written.

    Args:
        model: What is attacked.
        known: What the attacker learns from; 20, 50, 100 and 200 in the paper.
        held_out: By which it chooses its settings.
        space: What it chooses from.
        tested: By which the last runs are judged, if not by `held_out`.
        seed: Of the search and of the runs.

    Raises:
        UsageError: Optuna is missing.
    """
    trials: list[Trial] = []

    def tried(settings: Settings) -> float:
        accuracy = attack(model, known, held_out, settings, seed=seeded(seed, "trial", len(trials)))
        trials.append(Trial(settings, accuracy))
        return accuracy

    _optimise(tried, space, seeded(seed, "search") % 2**32)
    best = max(trials, key=lambda trial: trial.accuracy)
    judged = held_out if tested is None else tested
    accuracies = tuple(
        attack(model, known, judged, best.settings, seed=seeded(seed, "run", run))
        for run in range(space.runs)
    )
    return Assault(len(known), tuple(trials), best, accuracies)


def _optimise(tried: Callable[[Settings], float], space: Search, seed: int) -> None:
    """Try settings until there are enough trials, or too many in a row without a better one."""
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            'the search for an attacker\'s settings needs Optuna: pip install "model-surgery[study]"'
        ) from error
    loudness = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        for number in range(space.trials):
            trial = study.ask()
            settings = Settings(
                trial.suggest_float("rate", *space.rates, log=True),
                trial.suggest_int("steps", *space.steps),
                int(trial.suggest_categorical("batch_size", space.batch_sizes)),
                bool(trial.suggest_categorical("frozen", space.frozen)),
            )
            study.tell(trial, tried(settings))
            if number - study.best_trial.number >= space.patience:
                return
    finally:
        optuna.logging.set_verbosity(loudness)


def attack(model: TwoTasks, known: Examples, held_out: Examples, settings: Settings, *, seed: int) -> float:
    """The share of held-out examples whose harmful class is found after an attack; the model is not written.

    Args:
        model: What is attacked.
        known: What the attacker learns from, with a new head.
        held_out: What it is judged by.
        settings: How it trains.
        seed: Of its head, its batches and dropout.
    """
    source = torch.Generator().manual_seed(seeded(seed, "attack"))
    encoder = copy.deepcopy(model.encoder).requires_grad_(not settings.frozen)
    classes, width = model.harmful.shape
    last = nn.Parameter(head(width, classes, source).to(model.harmful))
    seen = _seen(encoder.eval(), known) if settings.frozen else known
    through = nn.Identity() if settings.frozen else encoder.train()
    optimiser = torch.optim.Adam([*through.parameters(), last], lr=settings.rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded(seed, "dropout"))
        for _ in range(settings.steps):
            batch = seen.draw(min(settings.batch_size, len(seen)), source)
            optimiser.zero_grad()
            cross_entropy(through(batch.inputs) @ last.T, batch.harmful).backward()
            optimiser.step()
    guessed = _encoded(encoder.eval(), held_out.inputs) @ last.detach().T
    return float((guessed.argmax(-1) == held_out.harmful).double().mean())


def _seen(encoder: nn.Module, known: Examples) -> Examples:
    """What a frozen encoder makes of the examples, computed once; without dropout, as no step can learn from it."""
    return Examples(_encoded(encoder, known.inputs), known.desired, known.harmful)


def _encoded(encoder: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder(inputs)
