"""What an adapter on the base carries whole: everything that alignment changed and the edit does not cover.

PEFT calls it `modules_to_save`: norms, embeddings that are not edited, matrices that were left out. It replaces whole
modules, so a module cannot be edited and carried at once.
"""

from collections.abc import Collection

from torch import nn

from surgery.adapter_names import WAY_OUT, Names, tied_parameters
from surgery.checkpoint.layout import Checkpoint
from surgery.errors import InputError


class Carried:
    """Modules that an adapter on the base carries, and the tensors of the aligned checkpoint that fill them.

    Args:
        edited: Parameters that the adapter edits.
        differing: Tensors that are not edited and differ from the base.
        names: Where the aligned checkpoint's tensors lie in the model.
        model: The base's model, without weights.
        aligned: The aligned checkpoint.

    Attributes:
        modules: Full names of the modules.
        tied: Whether one of them is an embedding that is also the head.

    Raises:
        InputError: A tensor that differs from base cannot be carried; the message names it.
    """

    def __init__(
        self,
        edited: Collection[str],
        differing: Collection[str],
        names: Names,
        model: nn.Module,
        aligned: Checkpoint,
    ) -> None:
        self._names, self._model, self._aligned = names, model, aligned
        self._stored = names.stored()
        self._edited = {name: name.rpartition(".")[0] for name in edited}
        self.tied = False
        self.modules = sorted({self._module(name) for name in differing})

    def _module(self, name: str) -> str:
        """The module to carry for a tensor."""
        place = self._names.place(name)
        if place is None or not place.whole:
            raise InputError(
                f"{name} differs from base and is a part of {place.parameter if place else 'nothing'} in the model, "
                f"which an adapter on the base cannot carry; use --anchor aligned, or {WAY_OUT}"
            )
        if place.parameter in tied_parameters(self._model):
            self.tied = True
            return self._embedding(name)
        module = place.parameter.rpartition(".")[0]
        inside = [
            edited for edited, own in self._edited.items() if own == module or own.startswith(f"{module}.")
        ]
        if inside or not module:
            raise InputError(
                f"{name} differs from base and belongs to {module or 'the model'}, in which {', '.join(inside[:1])} "
                f"is edited; an adapter on the base cannot hold both: use --anchor aligned, or {WAY_OUT}"
            )
        return module

    def _embedding(self, name: str) -> str:
        """The embedding that a tied tensor belongs to."""
        embedding = self._model.get_input_embeddings()  # type: ignore[operator]
        module: str = next(own for own, value in self._model.named_modules() if value is embedding)
        group = {own for own in self._aliases(f"{module}.weight") if own in self._stored}
        if len(group) != 1 or self._stored[next(iter(group))] != name:
            raise InputError(
                f"{name} is tied to other stored tensors, and both cannot be carried; use --anchor aligned"
            )
        return module

    def _aliases(self, parameter: str) -> list[str]:
        """All names of a parameter."""
        found = dict(self._model.named_parameters(remove_duplicate=False))
        return [name for name, value in found.items() if value is found.get(parameter)]

    def source(self, parameter: str) -> str:
        """The tensor of the aligned checkpoint that fills a parameter of a carried module."""
        for name in (parameter, *self._aliases(parameter)):
            if name in self._stored:
                return str(self._stored[name])
        raise InputError(
            f"{parameter} must be carried and {self._aligned.label} does not hold it; use --anchor aligned"
        )
