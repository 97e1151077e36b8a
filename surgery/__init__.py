"""Edit released language models so that harmful fine-tuning becomes hard, and measure whether it did.

    import surgery
    outcome = surgery.apply(surgery.LoX(rank=6, alpha=1.5), base="demo:base", model="demo:aligned", output="out")

Names are resolved when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "apply": "surgery.pipeline",
    "prepare": "surgery.job",
    "Outcome": "surgery.pipeline",
    "Options": "surgery.options",
    "LoX": "surgery.methods.lox",
    "merge": "surgery.merging",
    "immunise": "surgery.train.running",
    "Training": "surgery.train.training",
    "Vaccine": "surgery.methods.vaccine",
    "TVaccine": "surgery.methods.t_vaccine",
    "CircuitBreakers": "surgery.methods.circuit_breakers",
    "Booster": "surgery.methods.booster",
    "TAR": "surgery.methods.tar",
    "ConditionNumber": "surgery.methods.condition_number",
    "MLAC": "surgery.methods.mlac",
    "RepNoise": "surgery.methods.repnoise",
    "verify": "surgery.verification",
    "SurgeryError": "surgery.errors",
}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.job import prepare as prepare
    from surgery.merging import merge as merge
    from surgery.methods.booster import Booster as Booster
    from surgery.methods.circuit_breakers import CircuitBreakers as CircuitBreakers
    from surgery.methods.condition_number import ConditionNumber as ConditionNumber
    from surgery.methods.lox import LoX as LoX
    from surgery.methods.mlac import MLAC as MLAC
    from surgery.methods.repnoise import RepNoise as RepNoise
    from surgery.methods.t_vaccine import TVaccine as TVaccine
    from surgery.methods.tar import TAR as TAR
    from surgery.methods.vaccine import Vaccine as Vaccine
    from surgery.options import Options as Options
    from surgery.pipeline import Outcome as Outcome
    from surgery.pipeline import apply as apply
    from surgery.train.running import immunise as immunise
    from surgery.train.training import Training as Training
    from surgery.verification import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
