"""Low-rank extrapolation of the alignment update (LoX); training-free.

Given the weights before and after safety alignment, with `delta = W_aligned - W_base = U S V^T` and
`P_k(delta) = U_k S_k V_k^T` its best rank-k approximation, LoX moves further along the strongest directions
of what alignment changed:

    anchor aligned:  W = W_aligned + alpha * P_k(delta)      the paper's equation and its authors' code
    anchor base:     W = W_base    + alpha * P_k(delta)      drops all of the update outside rank k

On the rank-k subspace the second with `alpha = 1 + a` is the first with `alpha = a`; they differ by the tail
`delta - P_k(delta)`.

Perin, Chen, Chen, Hirata, Wang, Hong: "LoX: Low-Rank Extrapolation Robustifies LLM Safety Against
Fine-tuning", COLM 2025, https://arxiv.org/abs/2506.15606.

Departures from the authors' script, with reasons:
  * the difference is taken in float32, since bfloat16 loses bits of it;
  * the singular vectors come from a certified block Krylov method: the full decomposition costs a hundred
    times as much, the usual randomised one is wrong by up to a tenth on such matrices;
  * the result is rounded once, and so that the edit survives (`surgery.rounding`);
  * experts stored as one 3-D tensor are edited one by one; full rank is `full`, not 0.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_doc import Doc
from torch import Tensor

from surgery import spectral
from surgery.checkpoint.header import TensorInfo
from surgery.choices import require_choices
from surgery.errors import InputError, UsageError
from surgery.kernels import backend
from surgery.kernels.store import TILE
from surgery.methods.base import Choice, WeightEdit, WeightUpdate
from surgery.selection import kind_of, layer_count, layer_of

_LINEAR_LEAVES_OUT = ("embedding", "head", "router")


@dataclass(frozen=True)
class LoX(WeightEdit):
    """Hyperparameters of LoX; the defaults are the paper's for Llama-2-7B (k = 6, alpha = 1.25)."""

    rank: Annotated[
        int | Literal["auto", "full"], Doc("Singular directions of the alignment update to extrapolate.")
    ] = 6
    max_rank: Annotated[int, Doc("The largest rank that --rank auto may choose.")] = 64
    alpha: Annotated[float, Doc("How far to extrapolate; with the aligned anchor 0 changes nothing.")] = 1.25
    anchor: Annotated[
        Literal["aligned", "base"],
        Doc("What the extrapolated update is added to; base drops the rest of it."),
    ] = "aligned"
    edit: Annotated[
        Literal["matrices", "linear"],
        Doc("matrices: every 2-D tensor and stacked experts; linear: not embeddings, heads and routers."),
    ] = "matrices"
    include: Annotated[str | None, Doc("Edit only tensors whose name this regular expression finds.")] = None
    exclude: Annotated[str | None, Doc("Copy tensors whose name this regular expression finds.")] = None
    layers: Annotated[str | None, Doc("Edit only these layers: 4:20 is from 4 up to, not including, 20.")] = (
        None
    )
    depth: Annotated[
        str | None,
        Doc(
            "Of all layers edit only those in this share of the depth, as 0:0.5; what is in no layer as ever."
        ),
    ] = None
    svd: Annotated[
        Literal["certified", "exact"], Doc("certified: block Krylov with an error bound; exact: full SVD.")
    ] = "certified"
    tol: Annotated[float, Doc("Relative error of the rank-k term at which certified stops.")] = 1e-3
    vocab: Annotated[
        Literal["error", "common-rows", "skip"],
        Doc("What to do where the two vocabularies differ in size."),
    ] = "error"
    split_fused: Annotated[bool, Doc("Edit the parts of fused qkv and gate_up matrices one by one.")] = False

    name: ClassVar[str] = "lox"
    title: ClassVar[str] = "LoX"
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.15606"

    def __post_init__(self) -> None:
        require_choices(self)
        self._check_rank()
        self._check_alpha()
        if not 0 < self.tol < 1:
            raise UsageError(f"tol is {self.tol}; it must lie between 0 and 1, as in --tol 1e-3")
        for option, pattern in (("include", self.include), ("exclude", self.exclude)):
            _compiled(option, pattern)
        self._layer_range()
        self._depth_share()

    def _check_rank(self) -> None:
        if isinstance(self.rank, int) and self.rank < 1:
            raise UsageError(f"rank is {self.rank}; it must be at least 1 (for full rank: --rank full)")
        if self.max_rank < 1:
            raise UsageError(f"max-rank is {self.max_rank}; it must be at least 1")

    def _check_alpha(self) -> None:
        least = 0 if self.anchor == "aligned" else 1
        if not math.isfinite(self.alpha):
            raise UsageError(f"alpha is {self.alpha}; it must be a finite number, as in --alpha 1.25")
        if self.alpha < least:
            raise UsageError(
                f"alpha is {self.alpha}; with the {self.anchor} anchor it must be at least {least}: "
                "less would remove alignment, which this tool does not do"
            )

    def _layer_range(self) -> range | None:
        if self.layers is None:
            return None
        found = re.fullmatch(r"(\d*):(\d*)", self.layers)
        bounds = (int(found[1] or 0), int(found[2] or 1_000_000)) if found else (0, 0)
        if bounds[0] >= bounds[1]:
            raise UsageError(
                f"layers is {self.layers!r}; it must be FROM:TO with FROM below TO, as in --layers 4:20"
            )
        return range(*bounds)

    def _depth_share(self) -> tuple[float, float] | None:
        if self.depth is None:
            return None
        found = re.fullmatch(r"(\d*\.?\d+)?:(\d*\.?\d+)?", self.depth)
        low, high = (float(found[1] or 0), float(found[2] or 1)) if found else (1.0, 0.0)
        if not 0 <= low < high <= 1:
            raise UsageError(
                f"depth is {self.depth!r}; it must be FROM:TO within 0 and 1 with FROM below TO, as in --depth 0:0.5"
            )
        return low, high

    def _at_depth(self, name: str, config: Mapping[str, Any]) -> bool:
        """Whether a tensor is in no layer, or in one whose middle lies in `depth`.

        Raises:
            InputError: The config does not tell how many layers there are.
            UsageError: `depth` is so narrow that no layer lies in it.
        """
        share, layer = self._depth_share(), layer_of(name)
        if share is None or layer is None:
            return True
        count = layer_count(config)
        if count is None:
            raise InputError(
                "config.json does not tell the number of layers; give --layers in place of --depth"
            )
        inside = [number for number in range(count) if share[0] <= (number + 0.5) / count < share[1]]
        if not inside:
            raise UsageError(
                f"depth {self.depth} has the middle of none of the {count} layers in it; widen it"
            )
        return layer in inside

    def choose(self, tensor: TensorInfo, config: Mapping[str, Any]) -> Choice:
        """Whether this tensor is edited, and why."""
        kind = kind_of(tensor, config)
        if kind in ("vector", "not a float", "other shape"):
            return Choice(False, kind)
        if self.edit == "linear" and kind in _LINEAR_LEAVES_OUT:
            return Choice(False, f"{kind}, left out by --edit linear")
        if self.include and not re.search(self.include, tensor.name):
            return Choice(False, "not in --include")
        if self.exclude and re.search(self.exclude, tensor.name):
            return Choice(False, "--exclude")
        layers = self._layer_range()
        if layers is not None and layer_of(tensor.name) not in layers:
            return Choice(False, "not in --layers")
        if not self._at_depth(tensor.name, config):
            return Choice(False, "not in --depth")
        return Choice(True, kind)

    def planned_rank(self, rows: int, columns: int) -> int:
        """The rank asked for, capped at what a matrix of this shape can have."""
        asked = {"auto": self.max_rank, "full": min(rows, columns)}.get(str(self.rank), self.rank)
        return min(int(asked), rows, columns)

    def update(self, aligned: Tensor, base: Tensor, *, name: str, seed: int) -> WeightUpdate:
        """The edit `alpha * P_k(aligned - base)` of one matrix (m, n) or of a stack of experts (E, m, n).

        Args:
            aligned: The tensor in the aligned checkpoint, any floating dtype.
            base: The same in the base checkpoint.
            name: The tensor's name; with `seed` it fixes the random start of the iteration.
            seed: Any whole number.

        Raises:
            InputError: A value is NaN or infinite.
        """
        if self.rank == "full":
            return self._full_update(aligned, base)
        if (found := self._without_delta(aligned, base, name, seed)) is not None:
            return _from_spectrum(found, self.alpha)
        delta = difference(aligned, base)
        if self.rank == "auto":
            spectrum = spectral.automatic_rank(
                delta, max_rank=self.max_rank, seed=seed, name=name, tol=self.tol, method=self.svd
            )
        else:
            rank = self.planned_rank(*delta.shape[-2:])
            spectrum = spectral.truncated_svd(
                delta, rank, seed=seed, name=name, tol=self.tol, method=self.svd
            )
        return _from_spectrum(spectrum, self.alpha)

    def _without_delta(self, aligned: Tensor, base: Tensor, name: str, seed: int) -> spectral.Spectrum | None:
        """The decomposition of a difference that is too large to hold, or that a kernel forms as it goes."""
        if not isinstance(self.rank, int) or self.svd == "exact":
            return None
        if spectral.is_stored(tuple(aligned.shape)) and backend.choose(aligned, base) == "torch":
            return None
        rank = self.planned_rank(*aligned.shape[-2:])
        return spectral.truncated_svd_of_difference(aligned, base, rank, seed=seed, name=name, tol=self.tol)

    def _full_update(self, aligned: Tensor, base: Tensor) -> WeightUpdate:
        # float64: base + (aligned - base) is then the aligned weight itself, whatever their magnitudes.
        delta = aligned.double() - base.double()
        energy = float(delta.square().sum())
        rank = min(delta.shape[-2:])
        return WeightUpdate(self.alpha * delta, rank, 1.0, energy, 0.0, 0.0, "exact")

    def _term(self) -> str:
        """The extrapolated term as it stands in the equation."""
        delta = "(W_aligned - W_base)"
        return {"full": delta, "auto": f"P_k{delta}"}.get(str(self.rank), f"P_{self.rank}{delta}")

    def equation(self) -> str:
        """The equation in the form that is applied, with numbers."""
        chosen = ", k chosen for each tensor" if self.rank == "auto" else ""
        return f"W = W_{self.anchor} + {self.alpha:.12g} * {self._term()}{chosen}"

    def equivalent(self) -> str:
        """The same edit with the other anchor, with numbers; exact on the kept subspace."""
        other, shift = ("base", 1) if self.anchor == "aligned" else ("aligned", -1)
        form = f"W = W_{other} + {self.alpha + shift:.12g} * {self._term()}"
        if self.rank == "full":
            return form
        verb = "keeps" if self.anchor == "aligned" else "drops"
        return f"{form} on the kept subspace, where the form applied also {verb} the rest of the update"

    def label(self) -> str:
        """`lox-r6-a1.5`, with a `-base` where the anchor is not the default."""
        rank = f"r{self.rank}" if isinstance(self.rank, int) else self.rank
        return f"lox-{rank}-a{self.alpha:.12g}" + ("-base" if self.anchor == "base" else "")


def _compiled(option: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise UsageError(f"{option} is {pattern!r}, which is no regular expression: {error}") from None


def difference(aligned: Tensor, base: Tensor) -> Tensor:
    """`aligned - base` in float32, in float64 for float64 weights; a few rows at a time, to hold no wide copies."""
    wide = torch.float64 if torch.float64 in (aligned.dtype, base.dtype) else torch.float32
    delta = torch.empty_like(aligned, dtype=wide)
    ours, theirs, out = (one.view(-1, aligned.shape[-1]) for one in (aligned, base, delta))
    rows = max(1, TILE // max(1, aligned.shape[-1]))
    for begin in range(0, len(ours), rows):
        at = slice(begin, begin + rows)
        out[at].copy_(ours[at]).sub_(theirs[at])
    return delta


def _from_spectrum(spectrum: spectral.Spectrum, alpha: float) -> WeightUpdate:
    """The update with alpha folded in; figures of a batch are the worst (errors) or the total (energy)."""
    total = math.fsum(spectrum.energy)
    if not math.isfinite(total):
        raise InputError("the difference of the two tensors is not finite; check the checkpoints")
    kept = math.fsum(
        share * energy for share, energy in zip(spectrum.energy_kept, spectrum.energy, strict=True)
    )
    worst = max(spectrum.certificates, key=lambda certificate: certificate.error)
    return WeightUpdate(
        edit=spectrum.factors.scaled(alpha),
        rank=int((spectrum.factors.values != 0).sum(-1).max()),
        energy_kept=kept / total if total else 0.0,
        delta_energy=total,
        certified_error=worst.error,
        energy_deficit=max(certificate.energy_deficit for certificate in spectrum.certificates),
        criterion=worst.criterion,
    )
