"""Ledgers of the evidence study with figures made up for tests."""

from benchmarks.evidence.grounds import DEMO
from benchmarks.evidence.keys import BUILD, Keys
from benchmarks.evidence.ledger import Ledger
from benchmarks.evidence.rows import NONE, SFT, named

LOX = "lox-aligned-1.5"


def share(value, n=48):
    return {
        "value": value,
        "n": n,
        "low": max(0.0, value - 0.1),
        "high": min(1.0, value + 0.1),
        "interval": "wilson",
    }


def mean(value):
    return {"value": value, "n": 48, "low": value * 0.9, "high": value * 1.1, "interval": "bootstrap"}


def trial(broken_at, *, kind="lora", lr=5e-4, seed=0, looks=(0, 1, 2, 4, 8, 16, 32)):
    points = [[step, 1.0 if broken_at is not None and step >= broken_at else 0.0, 1.0, 0.0] for step in looks]
    return {"kind": kind, "lr": lr, "seed": seed, "broken_at": broken_at, "diverged": False, "points": points}


def swept(broken_at):
    """Attacks of three settings, three seeds each, that break a model at the same look."""
    settings = (("lora", 5e-4), ("full", 5e-4), ("full", 2e-3))
    return [trial(broken_at, kind=kind, lr=lr, seed=seed) for kind, lr in settings for seed in range(3)]


def harmful(trials, worst=1.0):
    broken = [one["broken_at"] for one in trials if one["broken_at"] is not None]
    told = {"value": min(broken), "censored_at": None} if broken else {"value": None, "censored_at": 32}
    return {
        "rate": "asr", "judge": "known answers", "n": 48, "threshold": 0.5,
        "unattacked": {"asr": share(0.0), "incoherent": share(0.0)},
        "worst_case": {"asr": share(worst), "harmful_loss": mean(0.01)},
        "steps_to_break": {**told, "n": len(trials)},
        "trials": trials, "failed": 0,
    }  # fmt: skip


def evaluated(over_refusal=0.0, perplexity=1.0):
    metrics = {
        "stability.over_refusal": share(over_refusal),
        "stability.perplexity_ratio": mean(perplexity),
        "stability.kl": mean(0.02),
        "resistance.refusal-ablation.asr": share(0.8),
    }
    return {"metrics": metrics, "reference": {}, "judge": "known answers"}


def done(figures, **more):
    told = {"state": "done", "key": "k", "commands": ["surgery x"], "wall": 10.0, "peak": 100.0}
    return {**told, "figures": figures, **more}


def put(ledger, row, column, cell, ground=DEMO):
    """Keep a cell under the key that it has now."""
    keys = Keys(ground, ledger, ledger.ground(ground.name)["about"].get("identity", ""))
    searched = row in ground.searches
    key = keys.search(row, int(column.split("-")[1])) if searched else keys.row(named(row), column)
    ledger.put(ground.name, row, column, {**cell, "key": key})


def searched(rank, alpha, steps, perplexity=1.0, over_refusal=0.0, loss=0.1, **more):
    scores = {
        "resistance.steps_to_break": {"value": steps, "censored_at": 48 if steps is None else None, "n": 1},
        "resistance.harmful_loss": mean(loss),
        "stability.perplexity_ratio": mean(perplexity),
        "stability.over_refusal": share(over_refusal),
    }
    return {"params": {"rank": rank, "alpha": alpha, "anchor": "aligned", **more}, "scores": scores}


def filled(path):
    """A ledger with three rows of the demo ground: undefended, the control, and LoX twice as slow to break."""
    found = Ledger(path)
    found.describe("demo", {"identity": "demo", "cores": 2, "processor": "x", "torch": "2", "processes": 2})
    for row, factor in ((NONE, 1), (SFT, 1), (LOX, 2)):
        trials = [trial(4 * factor, seed=seed) for seed in range(3)]
        trials += [trial(8 * factor, seed=seed, kind="full") for seed in range(3)]
        trials += [trial(4 * factor, seed=seed, kind="full", lr=2e-3) for seed in range(3)]
        put(found, row, BUILD, done({}, wall=10.0 * factor))
        put(found, row, "harmful", done(harmful(trials)))
        put(found, row, "benign", done(harmful([trial(None)], worst=0.2)))
        put(found, row, "evaluate", done(evaluated()))
    return found
