"""What every method that edits weights from two checkpoints offers, and what its edit of one tensor is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery.checkpoint.header import TensorInfo
from surgery.spectral import Factors

Anchor = Literal["aligned", "base"]


@dataclass(frozen=True)
class WeightUpdate:
    """What is to be added to one tensor of the anchor, in full precision.

    Attributes:
        edit: The addend: factors with alpha folded in, or a dense tensor where the rank is full.
        rank: Singular directions kept (the most over a batch of experts).
        energy_kept: Share of ||delta||_F^2 inside the kept directions, 0 to 1.
        delta_energy: ||delta||_F^2.
        certified_error: Bound on the relative error of the kept term; see `surgery.spectral.Certificate`.
        energy_deficit: Bound on the relative shortfall of the captured energy.
        criterion: Which of the certificate's criteria was met: "subspace", "energy" or "exact".
    """

    edit: Factors | Tensor
    rank: int
    energy_kept: float
    delta_energy: float
    certified_error: float
    energy_deficit: float
    criterion: str


@dataclass(frozen=True)
class Choice:
    """Whether a method edits a tensor, and why (or why not)."""

    edit: bool
    reason: str


@dataclass(frozen=True)
class WeightEdit(ABC):
    """A frozen record of hyperparameters with one verb, `update`.

    Attributes:
        name: As the command spells it.
        title: As people write it.
        paper: Where it comes from.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    @property
    @abstractmethod
    def anchor(self) -> Anchor:
        """The checkpoint that the edit is added to."""

    @abstractmethod
    def choose(self, tensor: TensorInfo, config: Mapping[str, Any]) -> Choice:
        """Whether the method edits this tensor of the aligned checkpoint; no tensor data is read."""

    @abstractmethod
    def planned_rank(self, rows: int, columns: int) -> int:
        """The largest rank an edit of a matrix of this shape can have."""

    @abstractmethod
    def update(self, aligned: Tensor, base: Tensor, *, name: str, seed: int) -> WeightUpdate:
        """The edit of one tensor; `delta` is known not to be zero."""

    @abstractmethod
    def equation(self) -> str:
        """What is computed, with numbers."""

    @abstractmethod
    def equivalent(self) -> str:
        """The same edit in the method's other published form, with numbers; empty where there is none."""

    @abstractmethod
    def label(self) -> str:
        """A short form of the hyperparameters for folder names, like `lox-r6-a1.5`."""
