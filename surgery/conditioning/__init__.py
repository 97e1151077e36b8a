"""Condition number immunisation in its paper's own setting: features that a linear probe is fitted on.

`regularisers` holds R_well and R_ill, `linear` the algorithm for a linear extractor, `measures` the ratios it is
judged by, `problems` makes tasks.
"""

from surgery.conditioning.linear import Conditioning, Immunised, Tasks, immunise
from surgery.conditioning.measures import Ratios, probing_steps, ratios
from surgery.conditioning.problems import tasks

__all__ = ["Conditioning", "Immunised", "Ratios", "Tasks", "immunise", "probing_steps", "ratios", "tasks"]
