"""Vectors for a donor's tokens from a file of their own, to be searched in place of its embeddings.

FOCUS (arXiv:2305.14481) trains them with fastText on text that the donor's tokenizer has cut; any will do that have a
vector for each token as the donor's vocabulary spells it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO

import numpy as np
import numpy.typing as npt

from weightsmith import dtypes
from weightsmith.checkpoint import open_checkpoint
from weightsmith.checkpoint.checkpoint import Identity
from weightsmith.checkpoint.storage import open_regular
from weightsmith.checkpoint.tensor import ArrayTensor, Tensor
from weightsmith.errors import CheckpointError, shown
from weightsmith.tokenizer.tokenizer import Tokenizer

# Longer lines are no vectors: 100,000 numbers.
_LONGEST = 2_000_000


@dataclass(frozen=True, eq=False)
class Vectors:
    """Where tokens lie.

    Attributes:
        tensor: ``[V, d]``.
        known: which numbers have a row in it: ``[size]``, bool.
        identities: the file.
    """

    tensor: Tensor
    known: npt.NDArray[np.bool_]
    identities: tuple[Identity, ...] = ()


def read_vectors(file: str, donor: Tokenizer) -> Vectors:
    """Read vectors for the tokens of a tokenizer.

    Args:
        file: a file of safetensors with one matrix, ``[V, d]``, whose rows are the donor's numbers; or word2vec's text:
            a token as the vocabulary spells it and its numbers in each line, apart by spaces, perhaps behind a line
            with how many lines and numbers there are.
        donor: the tokenizer.

    Raises:
        CheckpointError: if the file cannot be read, or holds something else.
    """
    if file.endswith(".safetensors"):
        return _of_matrix(file, donor)
    try:
        handle, facts = open_regular(file)
        with open(handle, "rb") as opened:
            matrix, known = _of_text(opened, file, donor)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    identity = Identity(os.path.abspath(file), facts.st_size, facts.st_mtime_ns, "")
    return Vectors(ArrayTensor(file, matrix), known, (identity,))


def _of_matrix(file: str, donor: Tokenizer) -> Vectors:
    opened = open_checkpoint(file)
    found = [tensor for tensor in opened.values() if len(tensor.shape) == 2 and dtypes.is_float(tensor.dtype)]
    if len(found) != 1 or len(opened) != 1:
        raise CheckpointError(
            f"{file}: expected one matrix of floating numbers with a row for each token of {donor.owner}; it has "
            f"{len(opened)} tensors"
        )
    if found[0].shape[0] < donor.size:
        raise CheckpointError(
            f"{file}: {shown(found[0].name)} has {found[0].shape[0]:,} rows, and the tokenizer of {donor.owner} "
            f"numbers its tokens up to {donor.size - 1:,}: expected a row for each number"
        )
    return Vectors(found[0], np.ones(donor.size, bool), opened.identities)


def _of_text(opened: IO[bytes], file: str, donor: Tokenizer) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    lines = _lines(opened, file)
    first = next(lines, None)
    if first is None:
        raise CheckpointError(f"{file} is empty; expected a token and its vector in each line")
    fields = first[1].split(b" ")
    width = len(fields) - 1
    if width == 1 and all(field.isdigit() for field in fields):
        width = int(fields[1])
    else:
        lines = chain([first], lines)
    if not 1 <= width <= _LONGEST:
        raise CheckpointError(f"{file}, line 1: expected a token and its vector, apart by spaces")
    matrix: npt.NDArray[np.float32] | None = None
    known = np.zeros(donor.size, bool)
    for number, line in lines:
        # A token may hold a space; numbers do not.
        name, *values = line.rsplit(b" ", width)
        try:
            vector = np.array(values, np.float32)
        except ValueError:
            vector = np.zeros(0, np.float32)
        if len(vector) != width or not np.isfinite(vector).all():
            raise CheckpointError(f"{file}, line {number:,}: expected a token and {width:,} finite numbers")
        place = donor.vocabulary.get(name.decode("utf-8", "replace"))
        if place is not None and not known[place]:
            if matrix is None:
                matrix = np.zeros((donor.size, width), np.float32)
            matrix[place], known[place] = vector, True
    if matrix is None:
        raise CheckpointError(
            f"{file} has a vector for none of the tokens of {donor.owner}; expected them as its vocabulary spells "
            f"them, such as {shown(next(iter(donor.vocabulary), ''))}"
        )
    return matrix, known


def _lines(opened: IO[bytes], file: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := opened.readline(_LONGEST):
        number += 1
        if len(line) == _LONGEST:
            raise CheckpointError(f"{file}, line {number:,} has more than {_LONGEST:,} bytes; it is no vector")
        # fastText ends lines with a space.
        stripped = line.rstrip(b" \r\n")
        if stripped:
            yield number, stripped
