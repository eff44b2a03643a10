"""An adapter taken out of a fine-tune, not written yet: which tensor becomes what, laid out before any is made."""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightsmith import dtypes
from weightsmith.adapters.codes import Quantization
from weightsmith.adapters.loaded import renamed_as_loaded
from weightsmith.adapters.peft_config import PREFIX, config_text
from weightsmith.checkpoint.checkpoint import Checkpoint, Companions
from weightsmith.checkpoint.companions import tokenizer_files, write_companions
from weightsmith.checkpoint.folder import EXTRACTION_FILE
from weightsmith.checkpoint.layout import ONE_FILE
from weightsmith.checkpoint.layout import Part as FilePart
from weightsmith.checkpoint.tensor import Tensor
from weightsmith.dtypes import DType
from weightsmith.engine.executor import Summary
from weightsmith.engine.plan import MATRIX_MEMORY, Plan
from weightsmith.engine.progress import ProgressListener, Silent
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.errors import MethodError, PlanError
from weightsmith.extraction.compact import Quantized, Shira, Signs, Sparse, shares_over_model
from weightsmith.extraction.difference import Difference, Sums
from weightsmith.extraction.lowrank import Factoring, LowRank, Spectra, has_zero_row
from weightsmith.extraction.modules import Module, Modules
from weightsmith.extraction.pairing import Pairing
from weightsmith.extraction.parts import Part, largest_need
from weightsmith.extraction.placement import Placement, base_of, find_tie, in_head, place, task_type
from weightsmith.extraction.ranks import Candidate, choose
from weightsmith.extraction.recipe import Recipe
from weightsmith.extraction.report import LeftOut, Matrix, Report, share
from weightsmith.extraction.room import Ahead, Room
from weightsmith.extraction.settings import Renaming, low_rank_config, own_config, shira_config
from weightsmith.plan.output import Output, check_folder

_RESIDENT = 150_000_000
# Most bytes of decompositions that are kept from choosing ranks until the factors are made.
_KEPT = 256_000_000


class Extraction(Output):
    """An adapter that is not written yet: its tensors are computed as they are.

    Attributes:
        recipe: how it is taken out.
        parts_of: what it holds for each matrix.
    """

    def __init__(
        self,
        recipe: Recipe,
        finetuned: Checkpoint,
        base: Checkpoint,
        *,
        threads: int | None = None,
        memory: int | None = None,
        progress: ProgressListener | None = None,
    ) -> None:
        """Look at both models, and decide what is kept of each tensor.

        Reads what must be known before anything can be written: which tensors changed; and, unless the rank is given,
        the singular values of every change, a matrix at a time in each thread.

        Args:
            recipe: how the adapter is taken out.
            finetuned: the fine-tune.
            base: what it was made from.
            threads: how many threads to use; by default one per core.
            memory: most bytes to hold; fewer matrices are worked on at a time where that takes it.
            progress: told of progress where models are read.

        Raises:
            PlanError: if the two cannot be compared, or nothing changed, or no thread could work within the memory.
            MethodError: if a setting does not fit them.
            CheckpointError: if one cannot be read, or a change is not finite.
        """
        self._pair = Pairing(finetuned, base)
        self.recipe = recipe
        self.parts_of: list[Part] = []
        self._memory = memory
        self._ahead = Ahead()
        self._threads = threads or default_threads()
        self._room = Room(MATRIX_MEMORY if memory is None else max(memory - _RESIDENT, 1), self._threads)
        self._listener = progress or Silent()
        self._finetuned = finetuned
        self._config = finetuned.config or base.config
        self._modules = Modules(finetuned, self._config)
        self._task = task_type(self._config) if recipe.for_peft else None
        self._tie = find_tie(finetuned, self._config)
        self._renaming = Renaming(recipe.rename)
        self._whole: list[str] = []
        # Sums over what no part stands for.
        self._lost: dict[str, Sums] = {}
        self._left_out: dict[str, str] = {}
        with ThreadMapper(self._threads, matrices=recipe.kind == "lora") as mapper:
            changed = self._pair.changed(mapper, self._listener)
            self._unchanged = len(finetuned) - len(changed)
            notes = [*self._pair.notes(), *self._sort(changed, mapper)]
            self._choose(mapper)
            self._measure_others(mapper)
        tensors, config = self._laid_out()
        super().__init__(
            f"{finetuned.name}-{base.name}",
            tensors,
            inputs=[finetuned, base],
            written={},
            companions=Companions(config, tokenizer_files(finetuned.companions.files)),
            warnings=notes,
        )
        self.is_adapter = True

    def to_yaml(self) -> str:
        """See :meth:`Output.to_yaml`."""
        return self.recipe.to_yaml()

    def parts(self) -> list[FilePart]:
        """See :meth:`Output.parts`: one file, as PEFT reads it."""
        return [FilePart("", "adapter_model")]

    def save(self, target: str | os.PathLike[str], **options: Any) -> Summary:
        """Compute the adapter and write it; see :meth:`Output.save`.

        Args:
            target: the folder to make.
            **options: those of :meth:`Output.save`, but for the shard size: PEFT reads one file.
        """
        check_folder(target, "an adapter is a folder, with its config beside the weights")
        self._room.most = threads = options.get("threads") or self._threads
        if options.get("memory") is not None:
            self._room.limit = max(options["memory"] - _RESIDENT, 1)
            self._check_memory(options["memory"])
        with ThreadMapper(1, matrices=self.recipe.kind == "lora"), self._ahead.working(self.parts_of, threads):
            return super().save(target, **{**options, "shard_size": ONE_FILE})

    def write_beside(self, folder: Path, plan: Plan) -> list[str]:
        """See :meth:`Output.write_beside`: the adapter's config, the report, and the tokenizer."""
        (folder / "adapter_config.json").write_text(config_text(self.config), "utf-8")
        content = {"settings": self.recipe.to_json(), **self.report().to_json(seconds=False)}
        (folder / EXTRACTION_FILE).write_text(config_text(content), "utf-8")
        return write_companions(folder, {}, self.companions.files)

    def report(self) -> Report:
        """Return what is lost; matrices that this run did not make are made to be measured.

        Raises:
            CheckpointError: if one cannot be read, or a change is not finite.
        """
        with ThreadMapper(self._threads, matrices=self.recipe.kind == "lora") as mapper:
            facts = list(mapper(lambda part: part.known_facts(), self.parts_of))
        matrices = [
            Matrix(
                part.name,
                part.difference.shape,
                part.rank,
                part.nbytes,
                energy=1 - share(found.error, found.sums.change) ** 2,
                error=share(found.error, found.sums.change),
                weight_error=share(found.error, found.sums.tuned),
                effective_rank=found.effective_rank,
                seconds=round(found.seconds, 4),
            )
            for part, found in zip(self.parts_of, facts, strict=True)
        ]
        left_out = [
            LeftOut(name, self._finetuned[name].shape, reason, math.sqrt(self._lost[name].change))
            for name, reason in self._left_out.items()
        ]
        lost = math.fsum([*(one.error for one in facts), *(self._lost[name].change for name in self._left_out)])
        change = math.fsum([*(one.sums.change for one in facts), *(one.change for one in self._lost.values())])
        tuned = math.fsum([*(one.sums.tuned for one in facts), *(one.tuned for one in self._lost.values())])
        return Report(
            tuple(matrices),
            tuple(self._whole),
            tuple(left_out),
            share(lost, change),
            share(lost, tuned),
            self.nbytes,
            sum(self._finetuned[name].nbytes for name in (*self._whole, *self._left_out))
            + sum(part.difference.tuned.nbytes for part in self.parts_of),
            self._unchanged,
        )

    # What each tensor becomes.

    def _sort(self, changed: Sequence[str], mapper: ThreadMapper) -> list[str]:
        """Decide which tensors are taken apart, kept whole and left out; return what a person should know."""
        recipe = self.recipe
        notes = []
        matrices: list[tuple[Difference, Module | None]] = []
        for name in changed:
            if _fits(name, recipe.exclude):
                self._left_out[name] = "excluded"
                continue
            difference, module = self._pair.difference(name), self._modules.find(name)
            if difference is not None and self._is_taken_apart(difference, module):
                matrices.append((difference, module))
                continue
            own, other = self._finetuned[name], self._pair.base_tensor(name)
            if other is not None and other.shape != own.shape and not recipe.only_matrices:
                notes.append(
                    f"{name} is {list(own.shape)} and the base's {list(other.shape)}: it is kept whole, and the base "
                    "must be brought to that shape before the adapter is loaded (resize_token_embeddings)"
                )
            self._keep_or_leave(name, "no matrix that is taken apart")
        if recipe.dora:
            zero = mapper(lambda one: one[1] is not None and has_zero_row(one[0], one[1]), matrices)
            for (one, _), found in zip(list(matrices), list(zero), strict=True):
                if found:
                    matrices = [entry for entry in matrices if entry[0] is not one]
                    self._keep_or_leave(one.name, "rows of zeros have no direction (DoRA)")
        self._make_parts(matrices, mapper)
        renamed = renamed_as_loaded(one.name for one, _ in matrices)
        if renamed is not None and recipe.for_peft and not recipe.rename:
            notes.append(
                f"transformers 5 loads this model's {renamed[0]} as {renamed[1]}, and PEFT ignores keys of other names "
                "without a word: give --rename for models that it loads (docs/guide/extract.md); weightsmith itself "
                "folds either"
            )
        return notes

    def _is_taken_apart(self, one: Difference, module: Module | None) -> bool:
        name = one.name
        if _fits(name, self.recipe.whole):
            return False
        if self.recipe.kind == "lora":
            if self._tie is not None and name == self._tie.embedding and (self.recipe.dora or self._tie.head is None):
                # A tied head would need a magnitude of its own; and of some models PEFT does not tie factors.
                return False
            return module is not None and not in_head(name, self._task)
        if self.recipe.kind == "sparse" and self.recipe.rank is not None:
            # PEFT's SHiRA knows linear layers, and entries that are fewer than the matrix has.
            if module is None or module.form != "linear" or in_head(name, self._task):
                return False
            return self.recipe.rank * sum(one.shape) <= one.size
        return len(one.shape) >= 2 and name.endswith(".weight") and one.size > 0

    def _keep_or_leave(self, name: str, reason: str) -> None:
        if self.recipe.only_matrices and not in_head(name, self._task):
            self._left_out[name] = reason
        else:
            self._whole.append(name)

    def _make_parts(self, matrices: Sequence[tuple[Difference, Module | None]], mapper: ThreadMapper) -> None:
        recipe, room = self.recipe, self._room
        if recipe.kind == "lora":
            rule = recipe.ranks
            spectra = Spectra(_KEPT)
            for one, module in matrices:
                assert module is not None
                factoring = Factoring(recipe.decomposition, self._dtype_of(one), recipe.dora, room, spectra)
                tied = self._tie.head if self._tie is not None and one.name == self._tie.embedding else None
                self.parts_of.append(LowRank(one, module, rule.cap(module.sides), factoring, tied=tied))
        elif recipe.kind == "sparse" and recipe.rank is not None:
            self.parts_of += [
                Shira(one, room, recipe.rank * sum(one.shape), self._dtype_of(one)) for one, _ in matrices
            ]
        elif recipe.kind == "sparse":
            differences = [one for one, _ in matrices]
            for one, count in zip(differences, self._counts(differences, mapper), strict=True):
                if count:
                    self.parts_of.append(Sparse(one, room, count, self._dtype_of(one)))
                else:
                    self._left_out[one.name] = "none of its entries is among the largest"
        elif recipe.kind == "sign":
            self.parts_of += [Signs(one, room) for one, _ in matrices]
        else:
            assert recipe.quantizer is not None
            assert recipe.bits is not None
            quantization = Quantization(recipe.quantizer, recipe.bits)
            self.parts_of += [Quantized(one, room, quantization) for one, _ in matrices]
        self._check_memory(self._memory)

    def _counts(self, differences: Sequence[Difference], mapper: ThreadMapper) -> list[int]:
        density = self.recipe.density
        assert density is not None
        if self.recipe.scope == "model":
            return shares_over_model(differences, max(round(density * sum(one.size for one in differences)), 1), mapper)
        return [max(round(density * one.size), 1) for one in differences]

    def _choose(self, mapper: ThreadMapper) -> None:
        """Choose ranks by the singular values of all matrices, where the rule asks for them."""
        if self.recipe.kind != "lora" or not self.recipe.ranks.needs_spectra:
            return
        parts = [part for part in self.parts_of if isinstance(part, LowRank)]
        self._listener.start(sum(part.difference.tuned.nbytes for part in parts), len(parts), 0)

        def survey(part: LowRank) -> tuple[Candidate, float]:
            found = part.survey()
            self._listener.advance(part.difference.tuned.nbytes)
            self._listener.tensor_done(part.name)
            return found

        try:
            found = list(mapper(survey, parts))
        finally:
            self._listener.finish()
        taken = sum(self._finetuned[name].nbytes for name in self._kept_whole(parts))
        ranks = choose(self.recipe.ranks, [candidate for candidate, _ in found], taken)
        if self.recipe.budget is not None and not any(ranks):
            raise PlanError(
                f"the budget of {self.recipe.budget:,} bytes is too small for a single triple; the smallest takes "
                f"{min((part.triple_bytes + part.fixed_bytes for part in parts), default=0):,}, and tensors that are "
                f"kept whole take {taken:,}"
            )
        self.parts_of = []
        for part, rank, (candidate, tuned) in zip(parts, ranks, found, strict=True):
            if rank:
                part.rank = rank
                self.parts_of.append(part)
            else:
                self._left_out[part.name] = (
                    "its change is zero but for rounding" if not len(candidate.values) else "the budget goes to others"
                )
                self._lost[part.name] = Sums(candidate.energy, tuned)

    def _measure_others(self, mapper: ThreadMapper) -> None:
        """Take the norms of tensors that no part stands for."""
        names = [name for name in (*self._whole, *self._left_out) if name not in self._lost]
        self._lost |= dict(zip(names, mapper(self._pair.sums, names), strict=True))

    def _dtype_of(self, one: Difference) -> DType:
        if self.recipe.dtype is not None:
            dtype = dtypes.float_from_name(self.recipe.dtype)
            if dtype.itemsize < 2:
                raise MethodError(
                    f"dtype is {self.recipe.dtype}, too coarse for factors; use float32, bfloat16 or float16"
                )
            return dtype
        dtype = one.tuned.dtype
        return dtype if dtype.itemsize in (2, 4) else np.dtype(np.float32)

    # Where it goes.

    def _kept_whole(self, parts: Sequence[Part]) -> list[str]:
        """Return the tensors that are written whole: those that changed, and others of their modules."""
        return list(self._placement(parts).keys)

    def _placement(self, parts: Sequence[Part]) -> Placement:
        whole = [*self._whole, *(name for name in self._finetuned if in_head(name, self._task))]
        whole = [name for name in dict.fromkeys(whole) if name not in self._left_out]
        # Loaded in its place, the one tensor of a tie is that of embedding and head.
        apart = [*self._left_out, *([self._tie.embedding] if self._tie is not None else [])]
        sizes = {name: tensor.nbytes for name, tensor in self._finetuned.items()}
        return place(whole, {part.module for part in parts}, self._modules, sizes, self._task, apart)

    def _laid_out(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the adapter's tensors and its config."""
        tensors = {tensor.name: tensor for part in self.parts_of for tensor in part.tensors(self._ahead)}
        if not self.recipe.for_peft:
            tensors |= {PREFIX + name: self._finetuned[name] for name in self._whole}
            return self._renaming.tensors(tensors), {**own_config(self.recipe), **base_of(self.recipe.base)}
        if not self.parts_of:
            raise PlanError(
                f"of {self._finetuned.name} no matrix changed that could be taken apart, and PEFT loads no such "
                f"adapter without one; what changed: {', '.join([*self._whole, *self._left_out][:3])} …"
            )
        placement = self._placement(self.parts_of)
        tensors |= {key: self._finetuned[name] for name, key in placement.keys.items()}
        paths = self._modules.paths
        parts = [part for part in self.parts_of if isinstance(part, LowRank)]
        if parts:
            own = low_rank_config(self.recipe, parts, paths, self._renaming, biases=placement.biases)
        else:
            own = shira_config(self.recipe, self.parts_of, paths, self._renaming)
        heads_left = any(in_head(name, self._task) for name in self._left_out)
        config = {
            **base_of(self.recipe.base),
            "task_type": None if heads_left else self._task,
            "inference_mode": True,
            "modules_to_save": [self._renaming.name(module) for module in placement.modules] or None,
        }
        return self._renaming.tensors(tensors), own | config

    def _check_memory(self, memory: int | None) -> None:
        largest = largest_need(self.parts_of)
        if memory is None or largest is None or largest.memory + _RESIDENT <= memory:
            return
        raise PlanError(
            f"{largest.name} needs about {(largest.memory + _RESIDENT) / 1e6:,.0f} MB of memory in one thread, and "
            f"--memory allows {memory / 1e6:,.0f} MB: allow more, keep the tensor whole (--whole '{largest.name}'), or "
            "leave it out (--exclude)"
        )


def _fits(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
