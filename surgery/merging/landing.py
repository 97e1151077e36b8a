"""On which tensors of a checkpoint's files the tensors of adapters land; whatever lands nowhere is an error.

Names are taken as they stand where the files have a tensor of that name. Where they do not (modules that transformers
renames, experts that are one parameter in memory and many tensors in the files), the model is built without weights
and PEFT asked which parameter a layer adapts, and that parameter is taken apart as the files have it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from surgery.adapter import ties_embeddings
from surgery.adapter_names import Names, build_model
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.layout import Checkpoint
from surgery.checkpoint.reading import shown
from surgery.errors import InputError
from surgery.merging.adapter import Adapter, Module
from surgery.merging.layers import Adapting, adapting
from surgery.selection import kind_of

WAY_OUT = "merge this adapter with PEFT"

# Model types whose layers store (in, out), which a square matrix does not show.
_TRANSPOSED_TYPES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))


@dataclass(frozen=True)
class Lora:
    """A low-rank delta of one tensor: scaling * B A, or a part of it.

    Attributes:
        adapter: Which adapter.
        label: Of the adapter, for messages.
        a: Name of A among all adapters' tensors: (r, in), for experts (E r, in).
        b: Name of B: (out, r), for experts (out, r E).
        rank: Of one matrix.
        scaling: What B A is multiplied by, the adapter's weight not included.
        weight: The adapter's.
        transposed: Whether the tensor holds the transpose of B A.
        experts: How many matrices the factors stack; 0 for one that is no stack.
        expert: Which of them the tensor is; None where it is all.
        row: The first row of the (expert's) matrix that the tensor holds.
        magnitude: Name of DoRA's magnitudes; None for plain LoRA.
    """

    adapter: int
    label: str
    a: str
    b: str
    rank: int
    scaling: float
    weight: float
    transposed: bool = False
    experts: int = 0
    expert: int | None = None
    row: int = 0
    magnitude: str | None = None


@dataclass(frozen=True)
class Added:
    """A delta of one tensor that is held as it is, multiplied by `scaling`."""

    adapter: int
    label: str
    name: str
    scaling: float


@dataclass(frozen=True)
class Replaced:
    """A new value for one tensor; to which the same adapter may add (an embedding saved with its LoRA)."""

    adapter: int
    label: str
    name: str


Part = Lora | Added | Replaced


def land(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, tuple[Part, ...]]:
    """What each edited tensor gets, by its name in the files of `checkpoint`.

    Raises:
        InputError: A tensor of an adapter lands nowhere, in part, on another shape, or beside one that replaces the
            same tensor; or a layer lacks the factors that others of its kind have. The message names it.
    """
    found: dict[str, list[Part]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, part in _Landing(checkpoint, adapter, weight).parts():
            found.setdefault(name, []).append(part)
    for name, parts in found.items():
        _refuse_together(name, parts)
    return {name: tuple(parts) for name, parts in found.items()}


def _refuse_together(name: str, parts: Sequence[Part]) -> None:
    """Refuse what cannot be added up: a replacement or DoRA beside another adapter's, or with a weight of its own."""
    for part in parts:
        replaces = isinstance(part, Replaced)
        others = [one for one in parts if one.adapter != part.adapter]
        if (replaces or (isinstance(part, Lora) and part.magnitude)) and others:
            other = others[0]
            raise InputError(
                f"{name} is {'replaced' if replaces else 'scaled (DoRA)'} by {part.label} and changed by "
                f"{other.label} as well; these cannot be added up: merge one, then train the other on it"
            )
        if isinstance(part, Lora) and part.magnitude and part.weight != 1.0:
            raise InputError(
                f"{name} is scaled by {part.label} (DoRA), which a --weight of {part.weight} means nothing for"
            )


class _Landing:
    """One adapter on one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, weight: float) -> None:
        self._checkpoint, self._adapter, self._weight = checkpoint, adapter, weight

    def parts(self) -> list[tuple[str, Part]]:
        """Tensors of the files with what they get from this adapter."""
        adapter = self._adapter
        if adapter.settings is None:
            return [self._added(name) for name in adapter.dense]
        found = [pair for module in adapter.modules for pair in self._module(module)]
        self._refuse_missing()
        self._refuse_tied([name for name, _ in found])
        # Replacements first: what the same adapter adds is added to them.
        found = [self._whole(name, key) for name, key in adapter.whole.items()] + found
        trained = [key for key in adapter.whole.values() if ".base_layer." not in key]
        if trained and self._weight != 1.0:
            raise InputError(
                f"{trained[0]} of {adapter.label} replaces a tensor, which a --weight of "
                f"{self._weight} means nothing for; leave out the weight"
            )
        return found

    def _key(self, name: str) -> str:
        return self._adapter.key(name)

    def _added(self, name: str) -> tuple[str, Part]:
        info = self._tensor(name, name)
        if info.shape != self._adapter.info(name).shape:
            raise self._misfit(name, self._adapter.info(name).shape, info)
        return name, Added(self._adapter.number, self._adapter.label, self._key(name), self._weight)

    def _tensor(self, name: str, source: str) -> TensorInfo:
        """The tensor of the files on which one of the adapter lands, of a kind that can be edited."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise InputError(
                f"{shown(source)} of {self._adapter.label} lands nowhere: {self._checkpoint.label} has no tensor "
                f"{shown(name)}; is it the model that the adapter was trained on?"
            )
        if not info.is_float or info.numel == 0:
            raise InputError(
                f"{shown(source)} of {self._adapter.label} lands on {shown(name)}, which is {info.dtype}; a merge "
                "needs 16 bits or more: save the model in bfloat16 first"
            )
        return info

    def _misfit(self, source: str, shape: Sequence[int], info: TensorInfo) -> InputError:
        return InputError(
            f"{shown(source)} of {self._adapter.label} changes a tensor of shape {list(shape)}, and "
            f"{shown(info.name)} of {self._checkpoint.label} is {list(info.shape)}; the adapter "
            "belongs to another model"
        )

    # What the names in the files settle.

    def _module(self, module: Module) -> list[tuple[str, Part]]:
        name = f"{module.name}.weight"
        info = self._checkpoint.tensors.get(name)
        transposed = None if info is None else self._orientation(module, info)
        if info is None or transposed is None:
            return self._in_memory(module)
        self._tensor(name, module.a)
        own = self._lora(module, self._adapter.info(module.a).shape[0], None, transposed=transposed)
        self._check_shape(own, info, self._product(module), module.a)
        return [(name, own), *self._bias(module, own.scaling)]

    def _product(self, module: Module) -> tuple[int, int]:
        """The shape of B A."""
        return self._adapter.info(module.b).shape[0], self._adapter.info(module.a).shape[1]

    def _orientation(self, module: Module, info: TensorInfo) -> bool | None:
        """Whether the tensor holds the transpose of B A; None where the shapes do not tell."""
        if module.embedding:
            return True
        rows, columns = self._product(module)
        if rows != columns:
            # The longer way round is a misfit, which is told apart later.
            return info.shape == (columns, rows)
        settings = self._adapter.settings
        doubtful = settings is None or settings.transposed
        return None if doubtful or self._checkpoint.config.get("model_type") in _TRANSPOSED_TYPES else False

    def _lora(self, module: Module, rank: int, known: Adapting | None, *, transposed: bool) -> Lora:
        """The delta of a whole module, its rank as the config says."""
        settings = self._adapter.settings
        if settings is None:
            raise InputError(f"{self._adapter.label} has no config; give the folder of a PEFT adapter")
        name = module.name.replace(".base_layer", "")
        asked = known.rank if known else settings.rank(name)
        if asked != rank:
            raise InputError(
                f"{shown(module.a)} of {self._adapter.label} has rank {rank}, and adapter_config.json says {asked}; "
                "its scaling is then not known: correct the config (r, rank_pattern)"
            )
        return Lora(
            adapter=self._adapter.number,
            label=self._adapter.label,
            a=self._key(module.a),
            b=self._key(module.b),
            rank=rank,
            scaling=known.scaling if known else settings.scaling(name, rank),
            weight=self._weight,
            transposed=transposed,
            experts=known.experts if known else 0,
            magnitude=self._key(module.magnitude) if module.magnitude else None,
        )

    def _check_shape(self, part: Lora, info: TensorInfo, product: tuple[int, int], source: str) -> None:
        """Refuse a tensor of another shape than the delta, and magnitudes of another length than its outputs."""
        matrix = product[::-1] if part.transposed else product
        shape = (part.experts, *matrix) if part.experts else matrix
        if shape != info.shape:
            raise self._misfit(source, shape, info)
        if part.magnitude is not None:
            name = part.magnitude.partition("/")[2]
            if self._adapter.info(name).numel != product[0]:
                raise self._misfit(name, self._adapter.info(name).shape, info)

    def _bias(self, module: Module, scaling: float) -> list[tuple[str, Part]]:
        """The delta of a module's bias, where the adapter has one."""
        if module.bias is None:
            return []
        info = self._tensor(f"{module.name}.bias", module.bias)
        if info.shape != self._adapter.info(module.bias).shape:
            raise self._misfit(module.bias, self._adapter.info(module.bias).shape, info)
        own = self._adapter
        return [(info.name, Added(own.number, own.label, self._key(module.bias), scaling * self._weight))]

    def _whole(self, name: str, key: str) -> tuple[str, Part]:
        """A tensor that replaces one of the model."""
        target = name.replace(".base_layer.", ".")
        if target not in self._checkpoint.tensors:
            target = self._memory.names.stored().get(target, target)
        info = self._tensor(target, key)
        if info.shape != self._adapter.info(key).shape:
            raise self._misfit(key, self._adapter.info(key).shape, info)
        settings = self._adapter.settings
        if settings is not None and settings.saves(name.rpartition(".")[0]):
            self._refuse_tied([target])
        return target, Replaced(self._adapter.number, self._adapter.label, self._key(key))

    # What only the model in memory settles.

    @cached_property
    def _memory(self) -> "_Memory":
        return _Memory(self._checkpoint, self._adapter)

    def _in_memory(self, module: Module) -> list[tuple[str, Part]]:
        """The tensors that make up the parameter which PEFT adapts by this module's factors."""
        known = self._memory.layers.get(module.name)
        if known is None:
            raise InputError(
                f"{shown(module.a)} of {self._adapter.label} lands nowhere: {self._checkpoint.label} has no tensor "
                f"{shown(module.name)}.weight, and its model no such layer; is it the model it was trained on?"
            )
        shape, names = self._memory.names.shape(known.parameter), self._memory.names
        rank, left = divmod(self._adapter.info(module.a).shape[0], known.experts or 1)
        own = self._lora(module, rank if not left else 0, known, transposed=known.transposed)
        whole = TensorInfo(known.parameter, "F32", shape, "", 0, 0)
        self._check_shape(own, whole, self._product(module), module.a)
        found: list[tuple[str, Part]] = []
        for name, place in names.sources(known.parameter).items():
            self._tensor(name, module.a)
            found.append((name, replace(own, expert=place.expert, row=place.row)))
        if not found:
            self._tensor(known.parameter, module.a)
        covered = sum(self._checkpoint.tensors[name].numel for name, _ in found)
        if covered != whole.numel:
            raise InputError(
                f"{shown(module.a)} of {self._adapter.label} changes {known.parameter}, of which the files of "
                f"{self._checkpoint.label} hold {covered} of {whole.numel} entries; {WAY_OUT}"
            )
        return [*found, *self._bias(module, own.scaling)]

    # What would be left out.

    def _refuse_missing(self) -> None:
        """Refuse an adapter of some layers of a kind, where its config means all of them."""
        settings = self._adapter.settings
        if settings is None or not settings.complete:
            return
        own = {module.name for module in self._adapter.modules}
        kinds = {_kind(name) for name in own}
        for name, info in self._checkpoint.tensors.items():
            module = name.removesuffix(".weight")
            meant = name != module and len(info.shape) == 2 and settings.targets(module)
            if meant and module not in own and _kind(module) in kinds:
                raise InputError(
                    f"{name} is a target of {self._adapter.label}, which has no factors for it though for others "
                    "of its kind; download the adapter again, or name its layers in layers_to_transform"
                )

    def _refuse_tied(self, names: Sequence[str]) -> None:
        """Refuse to edit an embedding that is also the head, where the adapter is on one of the two alone."""
        settings, config = self._adapter.settings, self._checkpoint.config
        if (
            settings is None
            or settings.fields.get("ensure_weight_tying")
            or not ties_embeddings(self._checkpoint)
        ):
            return
        for name in names:
            if kind_of(self._checkpoint.tensors[name], config) in ("embedding", "head"):
                raise InputError(
                    f"{name} is both the embedding and the head of {self._checkpoint.label}, and "
                    f"{self._adapter.label} changes one of them alone, which one tensor cannot hold; "
                    "train it with ensure_weight_tying"
                )


def _kind(module: str) -> str:
    """A module's name without the numbers of its layer and expert."""
    return ".".join("#" if part.isdigit() else part for part in module.split("."))


class _Memory:
    """The model in memory, as far as its names and shapes go."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter) -> None:
        model = build_model(checkpoint, WAY_OUT)
        self.names = Names(checkpoint.tensors, model, WAY_OUT)
        fields: Mapping[str, object] = adapter.settings.fields if adapter.settings else {}
        self._adapter, self._fields, self._model = adapter, fields, model

    @cached_property
    def layers(self) -> dict[str, Adapting]:
        """What PEFT adapts, by the names of layers in the adapter's file."""
        try:
            return adapting(self._fields, self._model)
        except ValueError as error:
            raise InputError(
                f"{self._adapter.label} does not fit the model: {error}; is it the one it was trained on?"
            ) from None
