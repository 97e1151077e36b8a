"""What an evaluation found of one model, kept beside its studies, so that nobody measures the same thing twice.

A run that was killed takes it up again; and the reference of many candidates is measured once.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.attacking.settings import Budget
from surgery.documents import write_json
from surgery.errors import InputError
from surgery.evaluate.assessment import Assessment, Say, Subject, assess
from surgery.evaluate.choices import Accuracy
from surgery.evaluate.learning import Curve, Look
from surgery.evaluate.materials import Materials
from surgery.evaluate.stability import Utility
from surgery.evaluate.suites import Measuring
from surgery.inputs import checkpoint_fingerprint
from surgery.scores import Score

FILE = "assessment.json"
"""Of a subject's folder."""


def assessed(
    subject: Subject,
    materials: Materials,
    measuring: Measuring,
    budget: Budget,
    *,
    seed: int,
    say: Say,
    required: bool = False,
) -> Assessment:
    """What is kept of the model in its folder, or else what `assess` finds, kept there from then on.

    Args:
        subject: Which model.
        materials: What it is measured on.
        measuring: How much is measured.
        budget: Of its attackers.
        seed: Of what has no seed of its own.
        say: Told of progress.
        required: The folder is another evaluation's: what is not there is not to be measured into it.

    Raises:
        InputError: What is required is not there, or is of another model, other data or another budget.
    """
    path = subject.folder / FILE
    identity = _identity(subject, materials, measuring, budget, seed)
    kept = _read(path)
    if kept.get("identity") == identity:
        say(f"{subject.ground.source.label}: taken from {path.parent}")
        return _restored(kept["found"])
    if required:
        differs = sorted(name for name in identity if kept.get("identity", {}).get(name) != identity[name])
        what = f"other {', '.join(differs)}" if kept else "nothing finished"
        raise InputError(
            f"{path.parent} holds {what}; give the output of an evaluation of {subject.ground.source.label} with the "
            "same options, or leave --reference-from out"
        )
    found = assess(subject, materials, measuring, budget, seed=seed, say=say)
    write_json(path, {"schema": 1, "identity": identity, "found": _document(found)})
    return found


def _identity(
    subject: Subject, materials: Materials, measuring: Measuring, budget: Budget, seed: int
) -> dict[str, Any]:
    """What the figures depend on, by words that an error can name."""
    ground = subject.ground
    told = {name: value for name, value in ground.document().items() if name not in ("model", "commit")}
    identity = {
        "version": __version__,
        "model": checkpoint_fingerprint(ground.checkpoint, ground.source)["shards"],
        "requests and judge": told,
        "data": hashlib.sha256(repr(materials).encode()).hexdigest(),
        "options": asdict(measuring),
        "budget": asdict(budget),
        "seed": seed,
    }
    # As it comes back from the file.
    read_back: dict[str, Any] = json.loads(json.dumps(identity))
    return read_back


def _read(path: Path) -> dict[str, Any]:
    """The kept document; an empty one where there is none that can be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _document(found: Assessment) -> dict[str, Any]:
    return {
        "losses": [list(one) for one in found.utility.losses],
        "scores": {name: score.document() for name, score in found.utility.scores.items()},
        "curves": found.curves,
        "cross": found.cross,
        "learnt": [curve.document() for curve in found.learnt],
        "inside": found.inside,
    }


def _restored(known: dict[str, Any]) -> Assessment:
    scores = {name: Score(**score) for name, score in known["scores"].items()}
    losses = [(float(nats), int(count)) for nats, count in known["losses"]]
    curves = tuple(map(_curve, known["learnt"]))
    return Assessment(Utility(losses, scores), known["curves"], known["cross"], curves, known["inside"])


def _curve(known: dict[str, Any]) -> Curve:
    looks = tuple(Look(look["steps"], Score(**look["loss"])) for look in known["looks"])
    answered = known["final_accuracy"]
    accuracy = Accuracy(**{name: Score(**score) for name, score in answered.items()}) if answered else None
    return Curve(looks, accuracy)
