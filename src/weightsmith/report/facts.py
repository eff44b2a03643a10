"""What headers and tokenizers tell of the models of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import xxhash

from weightsmith import dtypes
from weightsmith.architecture.config import tied_embeddings, tied_source
from weightsmith.architecture.stacks import Architecture, analyse, before_layers
from weightsmith.checkpoint.checkpoint import Checkpoint
from weightsmith.engine.expression import is_made
from weightsmith.errors import CheckpointError
from weightsmith.inspection import text_of, texts_of
from weightsmith.plan.vocabularies import token_rows
from weightsmith.report.findings import (
    Difference,
    DifferenceKind,
    DtypeShare,
    Layer,
    Model,
    TokenDifference,
    Vocabulary,
)
from weightsmith.report.inputs import Side
from weightsmith.tokenizer.tokenizer import read_tokenizer

BEFORE, AFTER = "before", "after"
# Tokens that are shown of those that differ.
_TOKENS = 8


def layer_of(architecture: Architecture, name: str) -> str:
    """Return the key of the layer that a tensor lies in, ``before`` or ``after`` outside layers."""
    place = architecture.locate(name)
    if place is not None:
        return place.stack.name(place.index, "")
    return BEFORE if before_layers(name) else AFTER


def layers_of(architecture: Architecture, keys: Sequence[str]) -> tuple[Layer, ...]:
    """Return those layers that hold tensors of a report, in order.

    Args:
        architecture: the base's layers.
        keys: keys of the layers that do.
    """
    inside = [
        Layer(stack.name(index, ""), "layer", stack.prefix, index)
        for stack in architecture.stacks
        for index in stack.indices
    ]
    everything = [Layer(BEFORE, "before", "", None), *inside, Layer(AFTER, "after", "", None)]
    known = set(keys)
    return tuple(layer for layer in everything if layer.key in known)


def describe(side: Side, vocabulary: Mapping[str, int] | None) -> Model:
    """Return what is known of a model without its weights.

    Args:
        side: the model.
        vocabulary: its tokens, None where they are not known.
    """
    checkpoint = side.checkpoint
    config = checkpoint.config
    shares: dict[str, list[int]] = {}
    for tensor in checkpoint.values():
        share = shares.setdefault(dtypes.name_of(tensor.dtype), [0, 0, 0])
        for place, more in enumerate((1, tensor.size, tensor.nbytes)):
            share[place] += more
    found = [DtypeShare(name, *share) for name, share in shares.items()]
    return Model(
        label=side.label,
        reference=side.reference,
        tensors=len(checkpoint),
        parameters=checkpoint.parameters,
        nbytes=checkpoint.nbytes,
        dtypes=tuple(sorted(found, key=lambda share: (-share.nbytes, share.dtype))),
        model_type=text_of(config.get("model_type")),
        architectures=texts_of(config.get("architectures")),
        layers=sum(len(stack.indices) for stack in analyse(checkpoint, config).main),
        tied=tied_embeddings(config),
        embedding_rows=token_rows(checkpoint) or None,
        vocabulary=None if vocabulary is None else Vocabulary(len(vocabulary), _fingerprint(vocabulary)),
        computed=any(is_made(tensor) for tensor in checkpoint.values()),
    )


def note_on_dtypes(side: Side) -> list[str]:
    """Return what a person should know where most of a model is in dtypes that are in no figure."""
    checkpoint = side.checkpoint
    others = [tensor for tensor in checkpoint.values() if not dtypes.is_float(tensor.dtype)]
    if 2 * sum(tensor.nbytes for tensor in others) <= checkpoint.nbytes:
        return []
    return [
        f"of {side.label}, {len(others):,} of {len(checkpoint):,} tensors hold whole numbers (a quantised model's, "
        "perhaps) and are in no figure"
    ]


def vocabularies(sides: Sequence[Side]) -> tuple[list[Mapping[str, int] | None], list[str]]:
    """Return the tokens of each model, and what a person should know of those that cannot be read."""
    found: list[Mapping[str, int] | None] = []
    notes = []
    for side in sides:
        try:
            tokenizer = read_tokenizer(side.checkpoint.companions.files, side.reference)
            found.append(None if tokenizer is None else tokenizer.vocabulary)
        except CheckpointError as error:
            found.append(None)
            notes.append(f"the tokens of {side.label} are not known: {error}")
    return found, notes


def token_differences(
    sides: Sequence[Side], vocabularies: Sequence[Mapping[str, int] | None]
) -> Iterator[TokenDifference]:
    """Yield how vocabularies differ from the base's, the first."""
    base = vocabularies[0]
    for side, own in zip(sides[1:], vocabularies[1:], strict=True):
        if base is None or own is None or own == base:
            continue
        added = [token for token in own if token not in base]
        removed = [token for token in base if token not in own]
        moved = [token for token, number in own.items() if base.get(token, number) != number]
        examples = (*added, *removed, *moved)[:_TOKENS]
        yield TokenDifference(side.label, len(added), len(removed), len(moved), examples)


def _fingerprint(vocabulary: Mapping[str, int]) -> str:
    found = xxhash.xxh3_64()
    for token, number in sorted(vocabulary.items(), key=lambda entry: (entry[1], entry[0])):
        found.update(f"{number}\0{token}\0".encode("utf-8", "surrogatepass"))
    digits: str = found.hexdigest()
    return digits


def differences(sides: Sequence[Side]) -> Iterator[Difference]:
    """Yield the tensors in which headers differ from the base's, the first."""
    base = sides[0].checkpoint
    for side in sides[1:]:
        model = side.checkpoint
        for name, tensor in base.items():
            own = model.get(name)
            if own is None:
                kind: DifferenceKind = "tied" if _is_tied(name, model) else "missing"
                yield Difference(side.label, name, kind, str(list(tensor.shape)), "")
            elif own.shape != tensor.shape:
                yield Difference(side.label, name, "shape", str(list(tensor.shape)), str(list(own.shape)))
            elif own.dtype != tensor.dtype:
                pair = (dtypes.name_of(tensor.dtype), dtypes.name_of(own.dtype))
                yield Difference(side.label, name, "dtype", *pair)
        for name, own in model.items():
            if name not in base:
                kind = "tied" if _is_tied(name, base) else "extra"
                yield Difference(side.label, name, kind, "", str(list(own.shape)))


def _is_tied(name: str, model: Checkpoint) -> bool:
    """Whether a tensor that a model lacks is its head, which is tied to its embeddings."""
    return tied_embeddings(model.config) and tied_source(name, model) is not None
