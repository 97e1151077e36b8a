"""MLAC in its paper's own setting: an encoder that learns a desired task and is made hard to teach a harmful one.

`model` holds an encoder under two heads, `training` censors it, `attacker` measures how well, `toy` is the paper's
task in 25 dimensions.

Henderson, Mitchell, Manning, Jurafsky, Finn: "Self-Destructing Models: Increasing the Costs of Harmful Dual Uses of
Foundation Models", AIES 2023, https://arxiv.org/abs/2211.14946.
"""

from surgery.censor.attacker import Assault, Search, Settings, attack, search
from surgery.censor.examples import Draw, Examples
from surgery.censor.model import TwoTasks, bert_tiny, mlp
from surgery.censor.toy import Toy
from surgery.censor.training import Censoring, Round, censor

__all__ = [
    "Assault",
    "Censoring",
    "Draw",
    "Examples",
    "Round",
    "Search",
    "Settings",
    "Toy",
    "TwoTasks",
    "attack",
    "bert_tiny",
    "censor",
    "mlp",
    "search",
]
