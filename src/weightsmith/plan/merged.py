"""A merge that has not been run: a checkpoint whose tensors are expressions."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.checkpoint.checkpoint import Checkpoint, Companions, File
from weightsmith.checkpoint.companions import write_companions
from weightsmith.checkpoint.layout import Part
from weightsmith.checkpoint.storage import is_url
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.plan import Plan
from weightsmith.plan.masks import masks_warning
from weightsmith.plan.output import Output, parts_of
from weightsmith.recipe.dump import to_yaml
from weightsmith.recipe.schema import Merge

RECIPE_FILE = "weightsmith.yaml"


@dataclass(frozen=True)
class Beside:
    """What is written beside the weights.

    Attributes:
        files: relative path -> file to copy, or content to write.
        chat_template: the chat template's text, or None to leave the tokenizer's own.
        card: the text of README.md, or None for none.
    """

    files: Mapping[str, File]
    chat_template: str | None = None
    card: str | None = None


class LazyCheckpoint(Output):
    """A checkpoint that can be saved: its tensors are computed as they are written.

    Attributes:
        recipe: the recipe that makes it.
        beside: what is written beside the weights.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        *,
        recipe: Merge,
        companions: Companions,
        beside: Beside,
        inputs: Sequence[Checkpoint],
        written: Mapping[str, DType],
        warnings: Sequence[str] = (),
        components: tuple[str, ...] = (),
        rearranged: Mapping[int, str] | None = None,
    ) -> None:
        """Collect what a result is made of.

        Args:
            name: how a person names it.
            tensors: its tensors by name.
            recipe: the recipe that makes it.
            companions: its config and files, as later steps of a pipeline see them.
            beside: what is written beside the weights.
            inputs: the checkpoints that its tensors come from.
            written: tensor name -> dtype in which it is written.
            warnings: what a person should know before saving it.
            components: see :class:`Checkpoint`.
            rearranged: id of a tensor of an input that was given other rows -> name of that input.
        """
        super().__init__(
            name,
            tensors,
            inputs=inputs,
            written=written,
            companions=companions,
            warnings=warnings,
            components=components,
        )
        self.recipe = recipe
        self.beside = beside
        self._rearranged = rearranged or {}

    def to_yaml(self) -> str:
        """Return the recipe that makes this checkpoint."""
        return to_yaml(self.recipe)

    def parts(self) -> list[Part]:
        """See :meth:`Output.parts`: the model, or a pipeline's components."""
        return parts_of(self)

    def owners(self) -> dict[int, str]:
        """See :meth:`Output.owners`."""
        return dict(self._rearranged) | super().owners()

    def examine(self, finished: Container[str], threads: int) -> list[str]:
        """See :meth:`Output.examine`."""
        # Behind a URL each of the stretches that tell of masks would be a request of its own.
        local = not any(is_url(identity.path) for identity in self.identities)
        left = [tensor for name, tensor in self.items() if name not in finished]
        warning = masks_warning(left, threads) if local else None
        return [] if warning is None else [warning]

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`."""
        notes = write_companions(folder, self.config, self.beside.files, chat_template=self.beside.chat_template)
        (folder / RECIPE_FILE).write_text(plan.recipe, "utf-8")
        if self.beside.card is not None:
            (folder / "README.md").write_text(self.beside.card, "utf-8")
        return notes
