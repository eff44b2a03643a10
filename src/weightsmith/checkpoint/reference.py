"""How a recipe names a model: ``path``, ``path@revision``, ``path+adapter``, ``path@revision+adapter@revision``.

One of the models of a bundle is ``path#task``, also after a revision. ``base+path#task`` names its base as well, where
the bundle does not hold it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from weightsmith.checkpoint.storage import is_url
from weightsmith.errors import RecipeError


@dataclass(frozen=True)
class Reference:
    """A model, perhaps at a revision, perhaps one of a bundle's, perhaps with an adapter on it.

    Attributes:
        path: a folder, a file, a hub id or a URL.
        revision: a branch, tag or commit of a hub id, or None.
        adapter: the adapter on it, or None; or one of a bundle's models that it is the base of.
        task: which model of a bundle, or None.
    """

    path: str
    revision: str | None = None
    adapter: Reference | None = None
    task: str | None = None

    def __str__(self) -> str:
        text = self.path if self.revision is None else f"{self.path}@{self.revision}"
        text = text if self.task is None else f"{text}#{self.task}"
        return text if self.adapter is None else f"{text}+{self.adapter}"

    @property
    def short_name(self) -> str:
        """The last part of the path, with the adapter's: a name that does not change with the folder it is in."""
        path = self.path.rstrip("/") or self.path
        name = path.replace("\\", "/").rsplit("/", 1)[-1]
        if name in ("", ".", ".."):
            name = os.path.basename(os.path.realpath(path)) or path
        name = name if self.revision is None else f"{name}@{self.revision}"
        name = name if self.task is None else f"{name}#{self.task}"
        return name if self.adapter is None else f"{name}+{self.adapter.short_name}"


def parse_reference(text: str | os.PathLike[str]) -> Reference:
    """Read a model reference.

    A path that exists here is taken as it stands, also where it holds ``+``, ``@`` or ``#``.

    Raises:
        RecipeError: if it is empty or names more than one revision, adapter or task.
    """
    text = os.fspath(text)
    if not text.strip():
        raise RecipeError("a model reference is empty")
    if os.path.exists(text):
        return Reference(text)
    path, _, task = text.rpartition("#")
    if task and "+" not in task and os.path.exists(path):
        return _one(text)
    if "+" in text:
        for place in (i for i, letter in enumerate(text) if letter == "+"):
            # The model's own path may hold '+': prefer the split whose left part exists.
            model = text[:place]
            if any(os.path.exists(part) for part in (model, model.split("@")[0], model.rpartition("#")[0])):
                return _with_adapter(text[:place], text[place + 1 :])
        if not is_url(text) and text.count("+") > 1:
            raise RecipeError(f"{text!r} names more than one adapter; fold them in one after the other in steps")
        model, _, adapter = text.partition("+")
        return _with_adapter(model, adapter)
    return _one(text)


def _with_adapter(model: str, adapter: str) -> Reference:
    if not model or not adapter:
        raise RecipeError(f"{model + '+' + adapter!r}: both sides of '+' must name something")
    return replace(_one(model), adapter=_one(adapter))


def _one(text: str) -> Reference:
    if os.path.exists(text):
        return Reference(text)
    path, sign, task = text.rpartition("#")
    if not sign or "/" in task:
        return _at_revision(text)
    if "#" in path and not os.path.exists(path):
        raise RecipeError(f"{text!r} names more than one task of a bundle")
    if not path or not task:
        raise RecipeError(f"{text!r}: both sides of '#' must name something")
    return replace(_at_revision(path), task=task)


def _at_revision(text: str) -> Reference:
    if os.path.exists(text) or is_url(text) or "@" not in text:
        return Reference(text)
    path, _, revision = text.rpartition("@")
    if "@" in path and not os.path.exists(path):
        raise RecipeError(f"{text!r} names more than one revision")
    if not path or not revision:
        raise RecipeError(f"{text!r}: both sides of '@' must name something")
    return Reference(path, revision)
