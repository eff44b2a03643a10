"""What a report found, as plain data: it goes to JSON and back, and into data frames.

Words used throughout:

* A *task vector* (tau) is a model's weights minus the base's. Where no base was named, the first model stands in for
  it (``Report.base_named`` is False): figures then say how models differ from that one, not what training did.
* Models go by their *label*: short and unique within a report. The base and the merged result have labels too.
* Norms are Euclidean. Shares, cosines and overlaps are fractions, not per cent. Counts are of entries (elements).
* An entry that is NaN or infinite (or beyond 2**100) in a tensor of any of the models takes no part in any figure about
  that tensor; NaN and infinities are counted under ``Health.nonfinite``. Integer and boolean tensors are in no figure.
* None always means that there is no such number: a cosine with nothing, a share of no entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from weightsmith.plan.run_record import RunRecord

# The number in every JSON report. It grows when a field changes its meaning or goes; new fields do not change it.
FORMAT = 1
# Shares of the entries of each tensor that overlaps of the largest are taken at.
TOPS = (0.01, 0.05, 0.2)
# Shares of the energy (sum of squared singular values) that ranks are given for.
ENERGIES = (0.90, 0.95, 0.99)

Kind = Literal["models", "recipe", "merged"]
Where = Literal["before", "layer", "after"]
Level = Literal["good", "note", "warning", "error"]
FileState = Literal["same", "changed", "missing", "unknown"]
DifferenceKind = Literal["missing", "extra", "shape", "dtype", "tied"]
Row = TypeVar("Row")


@dataclass(frozen=True)
class DtypeShare:
    """What of a model is of one dtype: number of tensors, entries and bytes."""

    dtype: str
    tensors: int
    entries: int
    nbytes: int


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens.

    Attributes:
        size: number of tokens in the tokenizer, those added later included.
        fingerprint: 16 hexadecimal digits; two tokenizers have the same where all tokens have the same ids.
    """

    size: int
    fingerprint: str


@dataclass(frozen=True)
class Model:
    """One of the models of a report.

    Attributes:
        label: short and unique in the report; all rows name models by it.
        reference: how it was named: a path, a hub id, an expression with adapters, the name of a recipe's step.
        tensors: number of tensors.
        parameters: number of entries in all of them.
        nbytes: their bytes in the dtypes they have.
        dtypes: the same by dtype, most bytes first.
        model_type: the config's ``model_type``; empty where it has none.
        architectures: the config's ``architectures``.
        layers: number of layers in its stacks, those that predict further tokens left out.
        tied: whether the head is tied to the embeddings.
        embedding_rows: rows of the table of tokens; None where no tensor is known as one.
        vocabulary: its tokens; None where no tokenizer lies beside the weights, or it cannot be read.
        computed: whether its tensors are computed (adapters on a base, a recipe's step) rather than stored.
    """

    label: str
    reference: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[DtypeShare, ...]
    model_type: str
    architectures: tuple[str, ...]
    layers: int
    tied: bool
    embedding_rows: int | None
    vocabulary: Vocabulary | None
    computed: bool


@dataclass(frozen=True)
class Layer:
    """A row of a heat map: a layer, or all that lies before or after the layers.

    Attributes:
        key: its name in all rows: ``model.layers.7``; ``before`` and ``after`` for what lies in no layer.
        where: which of these it is.
        stack: prefix of its stack (``model.layers``), empty outside layers.
        index: its number in the stack, None outside layers.
    """

    key: str
    where: Where
    stack: str
    index: int | None


@dataclass(frozen=True)
class TensorFacts:
    """A tensor that takes part in the figures: one that the base and at least one model hold in the same shape.

    Attributes:
        name: its name in the base.
        layer: key of its layer.
        component: what it is for; see :func:`weightsmith.architecture.components.component`.
        shape: its shape.
        dtypes: label of a model, base and result included -> its dtype there; models that lack it, or hold it in
            another shape, are left out.
    """

    name: str
    layer: str
    component: str
    shape: tuple[int, ...]
    dtypes: Mapping[str, str]


@dataclass(frozen=True)
class Scope:
    """What a row is about: a layer, a component, a component of a layer, a tensor, or (all None) everything.

    A row about a tensor names its layer and component as well.
    """

    layer: str | None = None
    component: str | None = None
    tensor: str | None = None


@dataclass(frozen=True)
class Scoped(Generic[Row]):
    """Rows of one table at every scope. Rows are in the order of layers and tensors, then of models.

    Attributes:
        total: over everything.
        components: per component.
        layers: per layer.
        cells: per layer and component.
        tensors: per tensor.
    """

    total: tuple[Row, ...] = ()
    components: tuple[Row, ...] = ()
    layers: tuple[Row, ...] = ()
    cells: tuple[Row, ...] = ()
    tensors: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Change:
    """How far one model (or the merged result) is from the base within a scope.

    Attributes:
        scope: what it is about.
        model: label.
        entries: entries compared.
        base_norm: norm of the base.
        norm: norm of the model.
        delta_norm: norm of the task vector.
        relative: ``delta_norm / base_norm``; None where the base is zero.
        changed: share of the entries whose value is not the base's; None where there are no entries.
        largest: largest magnitude of an entry of the task vector.
        mass: sum of magnitudes of the task vector.
        against: share of ``mass`` that lies against the elected sign of all models; see :class:`Conflict`. None
            where the mass is 0, and for the merged result.
        cosine_base: cosine between the model's weights and the base's.
        delta_cosine_base: cosine between the task vector and the base's weights. Where a model was trained from
            another base b0, tau = (w - b0) + (b0 - b), and this is near -0.7 rather than near 0.
    """

    scope: Scope
    model: str
    entries: int
    base_norm: float
    norm: float
    delta_norm: float
    relative: float | None
    changed: float | None
    largest: float
    mass: float
    against: float | None
    cosine_base: float | None
    delta_cosine_base: float | None


@dataclass(frozen=True)
class Agreement:
    """How the task vectors of two models lie to each other within a scope.

    Attributes:
        scope: what it is about.
        first: label.
        second: label.
        entries: entries compared.
        cosine: cosine of the two task vectors; None where one is zero.
        distance: norm of the difference of the two models.
        equal: share of the entries in which the two models have the same value.
        both_moved: share of the entries in which both task vectors are not zero.
        same_sign: share of those in which both have one sign.
        conflict: share of the two task vectors' mass that lies against the sign which the two elect:
            ``sum min(P, M) / sum (P + M)``, see :class:`Conflict`; from 0 (one sign everywhere) to 0.5.
    """

    scope: Scope
    first: str
    second: str
    entries: int
    cosine: float | None
    distance: float
    equal: float | None
    both_moved: float | None
    same_sign: float | None
    conflict: float | None


@dataclass(frozen=True)
class Conflict:
    """How much of all models' task vectors pulls against each other within a scope.

    TIES (arXiv:2306.01708, section 4) elects for each entry the sign of the greater total movement: with P the sum of
    the positive values over the models and M that of the magnitudes of the negative ones, the sign is + where P > M.
    What lies against the elected sign is ``min(P, M)`` and would be dropped by it. No entry is trimmed before, and
    all models weigh the same.

    Attributes:
        scope: what it is about.
        models: labels of those that hold the tensors; all of them in every scope but tensors.
        entries: entries compared.
        share: ``sum min(P, M) / sum (P + M)`` over the entries; from 0 to 0.5. None where nothing moved.
        contested: share of the entries that at least two models move in which they do not have one sign; None where
            no two models move one.
    """

    scope: Scope
    models: tuple[str, ...]
    entries: int
    share: float | None
    contested: float | None


@dataclass(frozen=True)
class Overlap:
    """Whether two models changed the same entries most.

    The set of a model holds the entries of a tensor with ``|tau| >= t``, where t is the k-th largest magnitude and
    k is the share ``top`` of the tensor's entries, rounded up: ties with t are in, zeros never are. Sets are formed
    within each tensor, and counts are added up over a scope.

    Attributes:
        scope: what it is about.
        first: label.
        second: label.
        top: the share: 0.01, 0.05 or 0.2.
        overlap: entries in both sets over those in the smaller one; None where one is empty.
        chance: the same for sets of these sizes drawn at random within each tensor.
        sizes: the share of the entries that each of the two sets holds: above ``top`` by ties, below by zeros.
    """

    scope: Scope
    first: str
    second: str
    top: float
    overlap: float | None
    chance: float | None
    sizes: tuple[float, float]


@dataclass(frozen=True)
class Subspace:
    """Whether the leading singular vectors of two models' task matrices span the same space.

    Attributes:
        tensor: name of the matrix.
        first: label.
        second: label.
        rank: k, the number of leading singular vectors of each.
        left: ``||U_a^T U_b||_F^2 / k``: 1 for the same space, 0 for orthogonal ones.
        right: the same of the right singular vectors.
        chance_left: what it is on average for random spaces: k over the rows.
        chance_right: k over the columns.
    """

    tensor: str
    first: str
    second: str
    rank: int
    left: float
    right: float
    chance_left: float
    chance_right: float


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one model's task matrix.

    Attributes:
        tensor: name of the matrix; a tensor of more axes is taken as rows by all the rest.
        layer: key of its layer.
        component: its component.
        model: label.
        shape: rows and columns.
        norm: Frobenius norm of the task matrix.
        indices: which singular values are listed, from 1 (the largest); thinned out for plots.
        values: those singular values.
        effective_rank: exponential of the entropy of the normalised singular values (Roy and Vetterli 2007).
        stable_rank: squared Frobenius norm over squared largest singular value.
        ranks: the rank that an extracted adapter needs for each share of the energy in ``energies``; None where only
            ``computed`` singular values are known and they do not hold so much.
        energies: 0.90, 0.95, 0.99.
        computed: number of singular values that were computed.
        exact: whether all singular values were computed. If not, a randomised range finder found the leading ones,
            and ``effective_rank`` is None.
    """

    tensor: str
    layer: str
    component: str
    model: str
    shape: tuple[int, int]
    norm: float
    indices: tuple[int, ...]
    values: tuple[float, ...]
    effective_rank: float | None
    stable_rank: float | None
    ranks: tuple[int | None, ...]
    energies: tuple[float, ...]
    computed: int
    exact: bool


@dataclass(frozen=True)
class Histogram:
    """How the entries of a task vector are distributed, over everything or over one component.

    Attributes:
        scope: everything, or a component.
        model: label.
        entries: how many entries were counted; fewer than there are where they were sampled.
        weight: entries that each counted one stands for, on average: 1 where all were counted.
        zero: share of the entries that are zero.
        edges: bounds of the magnitudes of the bins, ``[bins + 1]``, ascending; powers of the square root of 2, the odd
            ones cut to nine bits (1.4140625).
        positive: share of the entries in each bin, of positive values, ``[bins]``.
        negative: the same of negative values.
        mean: mean of the entries.
        deviation: their standard deviation.
        kurtosis: excess kurtosis: 0 for a normal distribution, 3 for a Laplace distribution. None where the
            deviation is 0.
        quantiles: magnitude that each of the shares in ``tops`` of the entries reach, over the scope as a whole; found
            from the bins, within some 3% for smooth distributions.
        tops: 0.01, 0.05, 0.2.
    """

    scope: Scope
    model: str
    entries: int
    weight: float
    zero: float
    edges: tuple[float, ...]
    positive: tuple[float, ...]
    negative: tuple[float, ...]
    mean: float
    deviation: float
    kurtosis: float | None
    quantiles: tuple[float, ...]
    tops: tuple[float, ...]


@dataclass(frozen=True)
class Nonfinite:
    """A tensor of a model, base and result included, with entries that are NaN or infinite: how many of each."""

    model: str
    tensor: str
    entries: int
    nan: int
    infinite: int


@dataclass(frozen=True)
class Rows:
    """A tensor of a model, base and result included, with rows that are all zero or that are there twice.

    Rows are along the first axis, of tensors of two axes and more; those of fewer than 8 entries, which are alike by
    chance, and of more than 262,144 are not looked at, nor are tensors of more than 4 million rows. Duplicates are
    found by hashes of 64 bits.

    Attributes:
        model: label.
        tensor: name.
        rows: number of rows.
        dead: number of rows that are zero.
        first_dead: the numbers of the first few of them.
        duplicated: rows that are the same, to the bit, as an earlier one; dead ones are left out.
        first_duplicated: the first few of them, each with the earlier row.
        new_dead: how many are dead here and not in the base: 0 for the base itself.
    """

    model: str
    tensor: str
    rows: int
    dead: int
    first_dead: tuple[int, ...]
    duplicated: int
    first_duplicated: tuple[tuple[int, int], ...]
    new_dead: int


@dataclass(frozen=True)
class Difference:
    """A tensor in which a model's header differs from the base's.

    Attributes:
        model: label.
        tensor: name.
        kind: ``missing`` in the model; ``extra`` in it; another ``shape``; another ``dtype``; ``tied``: the model
            leaves out a head that is tied to its embeddings, or holds one that the base ties.
        base: shape or dtype in the base, empty where it lacks the tensor.
        found: shape or dtype in the model, empty where it lacks the tensor.
    """

    model: str
    tensor: str
    kind: DifferenceKind
    base: str
    found: str


@dataclass(frozen=True)
class TokenDifference:
    """How a model's vocabulary differs from the base's; there is none where they are the same, or one is not known.

    Attributes:
        model: label.
        added: tokens that only the model has.
        removed: tokens that only the base has.
        moved: tokens that both have under different ids.
        examples: a few of all of them, as text.
    """

    model: str
    added: int
    removed: int
    moved: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Health:
    """What is wrong with models, or differs between them, tensor by tensor; empty tables where nothing is."""

    nonfinite: tuple[Nonfinite, ...] = ()
    rows: tuple[Rows, ...] = ()
    differences: tuple[Difference, ...] = ()
    tokens: tuple[TokenDifference, ...] = ()


@dataclass(frozen=True)
class Composition:
    """How much of each input is in a merged result within a scope.

    The result's change ``d = out - base`` is fitted by task vectors: ``d ~ sum_i c_i tau_i``, in the least squares
    sense over all entries of the scope that all of them have.

    Attributes:
        scope: what it is about.
        models: labels of the inputs that take part.
        coefficients: ``c_i`` of each. Where task vectors depend on each other (the same model twice), it is the
            solution of the smallest norm.
        cosines: cosine between d and each task vector; None where one is zero.
        contributions: ``c_i <d, tau_i> / |d|^2`` of each: they add up to ``r_squared``. None where d is zero.
        r_squared: share of ``|d|^2`` that the fit explains; None where d is zero.
        delta_norm: norm of d.
        residual_norm: norm of what is not explained.
    """

    scope: Scope
    models: tuple[str, ...]
    coefficients: tuple[float, ...]
    cosines: tuple[float | None, ...]
    contributions: tuple[float | None, ...]
    r_squared: float | None
    delta_norm: float
    residual_norm: float


@dataclass(frozen=True)
class RecipeInput:
    """A model of a recipe: its label and its parameters, each as the recipe writes it, in YAML."""

    model: str
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class RecipeFacts:
    """The recipe behind a report of a recipe or of a merged folder.

    Attributes:
        text: the whole recipe, as YAML.
        method: its merge method; of a pipeline, that of the last step.
        inputs: its models with their own parameters.
        parameters: parameters for all models, each in YAML.
        steps: names of the steps before.
        dtype: what the output is written in; empty for that of the inputs.
        by_tokens: whether embeddings and head are merged by tokens (``tokenizer``), rather than by the rows' numbers.
    """

    text: str
    method: str
    inputs: tuple[RecipeInput, ...]
    parameters: Mapping[str, str]
    steps: tuple[str, ...]
    dtype: str
    by_tokens: bool = False


@dataclass(frozen=True)
class InputFile:
    """A file that a merge read.

    Attributes:
        path: the file.
        nbytes: its length then.
        state: whether it is still the file that was read, by its length and the time of its last change: ``same``,
            ``changed`` or ``missing``; ``unknown`` behind a URL.
    """

    path: str
    nbytes: int
    state: FileState


@dataclass(frozen=True)
class Merged:
    """The folder or file that a merge wrote.

    Attributes:
        path: the folder or file.
        version: the version of weightsmith that wrote it.
        arithmetic: what computed it: ``numpy`` or ``torch``.
        written: when its manifest was written, UTC, ISO 8601; empty where that is not known.
        run: how long the merge took; None where that is not known: the folder was copied, or its file system keeps no
            attributes of files.
        files: its files of weights -> their bytes.
        inputs: the files that it was made from.
    """

    path: str
    version: str
    arithmetic: str
    written: str
    files: Mapping[str, int]
    inputs: tuple[InputFile, ...]
    run: RunRecord | None = None


@dataclass(frozen=True)
class Sampling:
    """A statistic that not all entries were looked at for.

    Attributes:
        statistic: which: ``overlap``, ``histogram``, ``spectra``, ``subspaces``.
        rule: how entries, or matrices, were chosen, in a sentence.
        looked_at: how many of them were looked at.
        of: of how many.
        unit: what is counted: ``entries`` or ``matrices``.
    """

    statistic: str
    rule: str
    looked_at: int
    of: int
    unit: Literal["entries", "matrices"]


@dataclass(frozen=True)
class Timing:
    """How long a stage of the report took: wall time in seconds, and the bytes it read."""

    stage: str
    seconds: float
    nbytes: int


@dataclass(frozen=True)
class Figure:
    """A number that advice or a finding rests on.

    Attributes:
        name: what it is, in words: ``cosine of the task vectors of math and code``.
        value: the number.
        unit: ``share``, ``cosine``, ``entries``, ``rows``, ``ratio``, ``p`` …; empty for a plain number.
    """

    name: str
    value: float
    unit: str = ""


@dataclass(frozen=True)
class Finding:
    """Something that a person should know, in words.

    Attributes:
        code: what kind of finding it is, a word that stays the same: ``wrong-base``, ``nonfinite``, ``identical`` …
        level: how grave it is.
        title: a few words.
        text: one to three sentences, with the figures in them and what to do.
        figures: the numbers it rests on.
        models: labels of the models it is about.
        scope: what it is about, if not everything.
        action: what to type: a command, or a recipe or a part of one (YAML), perhaps several lines; empty where the
            text says it all.
    """

    code: str
    level: Level
    title: str
    text: str
    figures: tuple[Figure, ...] = ()
    models: tuple[str, ...] = ()
    scope: Scope = field(default_factory=Scope)
    action: str = ""


@dataclass(frozen=True)
class BaseTest:
    """Whether a model was trained from the base that was named.

    Attributes:
        model: label.
        shares: whether it was; None where the figures do not tell.
        p: the chance that weights which have nothing to do with the base's lie as near to them as the model's do, at
            most; never 0, but 2.2e-308 for all that is less. None where no test was made.
        figures: the numbers it rests on.
    """

    model: str
    shares: bool | None
    p: float | None
    figures: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that a report says.

    Attributes:
        kind: whether it is about ``models``, about a ``recipe`` before it is run, or about a ``merged`` folder.
        version: the version of weightsmith that made it.
        exact: whether all entries were looked at for every statistic.
        base: what task vectors are taken from.
        base_named: whether a person named it; if not, it is the first model.
        models: the others, in order. Empty for a report about one model.
        result: the merged result, None unless the report is about a merged folder whose base is still there.
        layers: rows of heat maps, in order.
        components: components that occur, in a fixed order.
        tensors: the tensors that take part in figures, in order.
        changes: how far each model is from the base; the result's rows come last.
        agreements: how each two models lie to each other.
        conflicts: how much all models pull against each other; empty for fewer than two.
        overlaps: whether each two models changed the same entries most: over everything, per layer and per component.
        subspaces: whether leading singular vectors of chosen matrices span the same space.
        spectra: singular values of chosen matrices.
        histograms: distributions over everything (``total``) and per component; the other scopes are empty.
        health: NaN, dead rows and differing tensors.
        composition: how much of each input is in the result; empty unless there is one.
        recipe: the recipe, None for a report about models.
        merged: the folder, None unless the report is about one.
        sampling: what was sampled, and how.
        timings: how long each stage took. They alone differ between two reports on the same models.
        notes: what a person should know about the report itself: tensors left out, inputs that are no longer there.
        base_tests: one for each model.
        findings: what is remarkable in the health of the models, the gravest first.
        advice: what to do, each with the figures it rests on, the most important first.
    """

    kind: Kind
    version: str
    exact: bool
    base: Model
    base_named: bool
    models: tuple[Model, ...]
    result: Model | None
    layers: tuple[Layer, ...]
    components: tuple[str, ...]
    tensors: tuple[TensorFacts, ...]
    changes: Scoped[Change]
    agreements: Scoped[Agreement]
    conflicts: Scoped[Conflict]
    overlaps: Scoped[Overlap]
    subspaces: tuple[Subspace, ...]
    spectra: tuple[Spectrum, ...]
    histograms: Scoped[Histogram]
    health: Health
    composition: Scoped[Composition]
    recipe: RecipeFacts | None = None
    merged: Merged | None = None
    sampling: tuple[Sampling, ...] = ()
    timings: tuple[Timing, ...] = ()
    notes: tuple[str, ...] = ()
    base_tests: tuple[BaseTest, ...] = ()
    findings: tuple[Finding, ...] = ()
    advice: tuple[Finding, ...] = ()

    def frames(self, library: str = "pandas") -> dict[str, Any]:
        """Return every table as a data frame: see :func:`weightsmith.report.frames.frames`.

        Args:
            library: ``pandas`` or ``polars``.

        Raises:
            ReportError: if the library is another, or not installed.
        """
        from weightsmith.report.frames import frames

        return frames(self, library)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values; ``format`` is the number of the schema. All numbers are finite."""
        from pydantic import TypeAdapter

        content: dict[str, Any] = TypeAdapter(Report).dump_python(self, mode="json")
        return {"format": FORMAT, **content}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Report:
        """Return the report that :meth:`to_json` gave.

        Args:
            content: the JSON values.

        Raises:
            ReportError: if it is no report, or one of another format.
        """
        from pydantic import TypeAdapter, ValidationError

        from weightsmith.errors import ReportError

        found = content.get("format")
        if found != FORMAT:
            raise ReportError(f"a report of format {found!r}; this version reads {FORMAT}: make the report anew")
        try:
            return TypeAdapter(cls).validate_python({k: v for k, v in content.items() if k != "format"})
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ReportError(f"not a report of weightsmith: {place}: {first['msg']}; make the report anew") from error
