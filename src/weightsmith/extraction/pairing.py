"""A fine-tune beside its base: which tensors belong together, and which of them changed."""

from __future__ import annotations

from functools import cached_property

from weightsmith import dtypes
from weightsmith.architecture.config import is_head, tied_embeddings, tied_source
from weightsmith.bundle.identical import identical
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.engine.progress import ProgressListener
from weightsmith.engine.threads import ThreadMapper
from weightsmith.errors import PlanError
from weightsmith.extraction.difference import Difference, Sums, weights_of


class Pairing:
    """A fine-tune and its base.

    Attributes:
        finetuned: the fine-tune.
        base: the base.
    """

    def __init__(self, finetuned: Checkpoint, base: Checkpoint) -> None:
        """Put two models beside each other.

        Raises:
            PlanError: if one of them is no model of weights, or they have nothing in common.
        """
        _check(finetuned, base)
        self.finetuned = finetuned
        self.base = base
        if not self._found:
            raise PlanError(
                f"{finetuned.name} and {base.name} have no tensor of the same name; is one of them the model that the "
                "other was made from?"
            )

    def base_tensor(self, name: str) -> Tensor | None:
        """Return the base's tensor for a name of the fine-tune's, or None.

        A head's wrapper adds a first part to names, which one of the two may lack; and a head that is tied in the base
        is its embeddings.
        """
        other = name if name in self.base else name.partition(".")[2]
        if other not in self.base:
            other = self._unwrapped.get(name, "")
        if other not in self.base and is_head(name) and tied_embeddings(self.base.config):
            other = tied_source(name, self.base) or ""
        return self.base.get(other)

    def difference(self, name: str) -> Difference | None:
        """Return what changed in a tensor, or None where it is no difference of floats of one shape."""
        own, other = self.finetuned[name], self.base_tensor(name)
        if other is None or other.shape != own.shape:
            return None
        return Difference(name, other, own) if dtypes.is_float(own.dtype) and dtypes.is_float(other.dtype) else None

    def sums(self, name: str) -> Sums:
        """Return sums over the change of a tensor; of one that the base lacks, or has in another shape, over itself."""
        difference = self.difference(name)
        if difference is not None:
            return difference.sums()
        own = self.finetuned[name]
        found = weights_of(own) if dtypes.is_float(own.dtype) else 0.0
        return Sums(found, found)

    def changed(self, mapper: ThreadMapper, listener: ProgressListener) -> list[str]:
        """Return the tensors that the base has otherwise, or not at all.

        Args:
            mapper: what works on them.
            listener: told of progress, in bytes of the fine-tune.

        Raises:
            PlanError: if there are none.
        """
        listener.start(self.finetuned.nbytes, len(self.finetuned), 0)

        def differs(name: str) -> bool:
            own, other = self.finetuned[name], self.base_tensor(name)
            found = other is None or own.shape != other.shape or not _same(own, other)
            listener.advance(own.nbytes)
            return found

        names = list(self.finetuned)
        try:
            found = [name for name, differ in zip(names, mapper(differs, names), strict=True) if differ]
        finally:
            listener.finish()
        if not found:
            raise PlanError(f"{self.finetuned.name} is {self.base.name}, to the bit: there is nothing to extract")
        return found

    def notes(self) -> list[str]:
        """Return what a person should know of models of two kinds, and of tensors that the fine-tune lacks."""
        own, other = (one.config.get("model_type") for one in (self.finetuned, self.base))
        differ = own is not None and other is not None and own != other
        kinds = f"{self.finetuned.name} is of the kind {own} and {self.base.name} of the kind {other}: "
        found = [kinds + "what is extracted means something only if one was made from the other"] if differ else []
        missing = [name for name, tensor in self.base.items() if id(tensor) not in self._found and not is_head(name)]
        if not missing:
            return found
        names = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        return [*found, f"the base has {len(missing)} tensors that the fine-tune lacks, and keeps them: {names}"]

    @cached_property
    def _found(self) -> set[int]:
        found = [self.base_tensor(name) for name in self.finetuned]
        return {id(tensor) for tensor in found if tensor is not None}

    @cached_property
    def _unwrapped(self) -> dict[str, str]:
        """The base's names by what follows their first part."""
        return {name.partition(".")[2]: name for name in self.base}


def _check(finetuned: Checkpoint, base: Checkpoint) -> None:
    for one in (finetuned, base):
        if one.is_adapter:
            raise PlanError(f"{one.name} is an adapter; name a model: BASE+{one.name}")
        if one.components:
            raise PlanError(
                f"{one.name} is a pipeline of several models; extract one of its components: "
                f"{one.name}/{one.components[0]}"
            )
        if one.config.get("quantization_config"):
            raise PlanError(f"{one.name} is quantised: its tensors are codes, and their differences are no changes")


def _same(own: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers."""
    if own.dtype == other.dtype:
        return identical(own, other)
    if not dtypes.is_float(own.dtype) or not dtypes.is_float(other.dtype):
        return False
    return not any(change.any() for _, _, _, change in Difference(own.name, other, own).tiles())
