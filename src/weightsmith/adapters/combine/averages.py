"""Means of adapters, with weights that follow from metrics, samples or the adapters themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from weightsmith.adapters.combine.inputs import Inputs, folder_of, step_in_name
from weightsmith.adapters.combine.registry import factors
from weightsmith.adapters.combine.tensors import alike, rows_of
from weightsmith.checkpoint.json_text import parse_object
from weightsmith.checkpoint.rows import read_wide
from weightsmith.checkpoint.storage import read_whole
from weightsmith.errors import CheckpointError, MethodError
from weightsmith.methods.averages import metric_shares
from weightsmith.methods.parameters import Param

Average = Annotated[
    Literal["products", "factors"],
    Param("average the deltas themselves, or the adapters' tensors as they are: A and B each by itself"),
]
_LARGEST_STATE = 64_000_000


@factors(
    "mwa",
    source="Yu and Choi, Parameter-efficient checkpoint merging via metrics-weighted averaging, 2025, "
    "arXiv:2504.18580; the forms of the weights inferred from the abstract",
)
def mwa(
    inputs: Inputs,
    *,
    metrics: Annotated[
        str,
        Param(
            "loss or step, read from trainer_state.json beside each checkpoint (a step also from its folder's "
            "name); or with values: loss:1.9,1.7 or step:500,1000 or score:0.7,0.8"
        ),
    ] = "loss",
    p: Annotated[float, Param("how sharply weights follow the metric; 0 is the plain mean", minimum=0)] = 1.0,
    kind: Annotated[
        Literal["power", "exponential"], Param("weights as loss^-p (step^p), or as exp(-p loss)")
    ] = "power",
    average: Average = "products",
) -> list[float]:
    """Metrics-weighted averaging (MWA) of the checkpoints of one run: later or better ones weigh more.

    ``sum_i w_i d_i`` with ``sum_i w_i = 1``, and ``w_i ~ loss_i^-p``, ``exp(-p loss_i)``, or ``step_i^p``; ``p = 0`` is
    the plain mean. The paper's own formula is not public; these have its stated properties (inferred). What is averaged
    is the products B A, which is safe; ``average: factors`` averages A and B apart, as the paper does, and the mean of
    B times the mean of A is not the mean of B A. Weights that are given (``--weight``) multiply those of the metric.
    """
    name, values = _metrics(metrics, inputs)
    if kind == "exponential" and name != "loss":
        raise MethodError(f"kind: exponential is for losses, and the metric is {name!r}; leave it out")
    for label, value in zip(inputs.labels, values, strict=True):
        if value < 0 or (name == "loss" and kind == "power" and value == 0) or value != value:
            raise MethodError(f"the metric {name!r} of {label} is {value:g}, which has no such weight")
    if name != "loss" and p > 0 and not any(values):
        raise MethodError(f"the metric {name!r} of every adapter is 0, so none has a weight")
    form: Any = "score" if name != "loss" else "loss" if kind == "power" else "exp_loss"
    return _shares(
        [share * weight for share, weight in zip(metric_shares(values, form, p), inputs.weights, strict=True)]
    )


@factors(
    "fedavg",
    source="McMahan et al., Communication-efficient learning of deep networks from decentralized data, AISTATS 2017, "
    "arXiv:1602.05629; of LoRAs: Zhang et al., FedIT, 2023, arXiv:2305.05644; of FedPara: Hyeon-Woo et al., ICLR 2022, "
    "arXiv:2108.06098",
)
def fedavg(
    inputs: Inputs,
    *,
    average: Average = "products",
    only: Annotated[
        str | None, Param("with average: factors, the parts to average, such as lora_A; others are the first adapter's")
    ] = None,
) -> list[float]:
    """Federated averaging: a mean of clients' adapters, weighted by how many samples each has (``--weight``).

    ``sum_i n_i d_i / sum_i n_i``. By default the products B A are averaged, which is what the server means;
    ``average: factors`` averages every tensor by itself, which is what FedIT and FedPara's clients send, and gives
    cross terms B_i A_j. It works on adapters of any kind, LoHa (FedPara) among them, of equal shapes and settings, and
    its result is of that kind. pFedPara shares one of its two products and keeps the other on the client:
    ``only: hada_w1_a,hada_w1_b``; FFA-LoRA shares B alone: ``only: lora_B``.
    """
    if only is not None and average == "products":
        raise MethodError("'only' names tensors, which are averaged with average: factors")
    return _shares(inputs.weights)


@factors(
    "icm",
    source="Shao et al., ICM-Fusion: In-context meta-optimized LoRA fusion, 2025, arXiv:2508.04153; the linear form is "
    "ours, inferred",
)
def icm(
    inputs: Inputs,
    *,
    components: Annotated[
        int | None, Param("how many principal components the adapters are described by; by default all", minimum=1)
    ] = None,
) -> list[float]:
    """The linear form of ICM-Fusion: the mean of adapters in the space of their principal components.

    ICM-Fusion trains an autoencoder on many adapters and takes a mean of theirs in its latent space, which no weights
    alone can repeat. Linear, the encoder is a PCA: adapters are flattened, every tensor is centred and divided by its
    standard deviation over adapters and entries, the weighted mean of the coordinates in the leading components is
    taken, and turned back. With all components that is the weighted mean of the factors; with fewer, what the leading
    ones do not hold goes back to the plain mean. With equal weights it is the plain mean whatever their number.
    Adapters must be of one kind, shape and rank. Inferred from the abstract; only what is linear of it is here.
    """
    names = alike(inputs)
    count = len(inputs.adapters)
    gram = np.zeros((count, count))
    for name in names:
        rows = rows_of(inputs, name)
        parts = np.stack([read_wide(tensor, 0, tensor.size) for tensor in rows])
        parts -= parts.mean(axis=0)
        deviation = float(np.sqrt(np.mean(parts * parts)))
        if not np.isfinite(deviation):
            raise CheckpointError(f"{name}: values are NaN or infinite")
        if deviation:
            parts /= deviation
            gram += parts @ parts.T
    shares = np.asarray(_shares(inputs.weights))
    found, vectors = np.linalg.eigh(gram)
    rank = int((found > max(float(found[-1]), 0.0) * count * 1e-12).sum())
    kept = vectors[:, ::-1][:, : min(components or rank, rank)]
    # In the space of the adapters: the mean's coordinates are combinations of theirs.
    along = kept @ (kept.T @ shares)
    return [float(value) for value in 1 / count + along - along.mean()]


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    if abs(total) < 1e-12 * sum(map(abs, weights)) or total == 0:
        raise MethodError("the weights sum to 0, so there is no mean with them")
    return [weight / total for weight in weights]


def _metrics(text: str, inputs: Inputs) -> tuple[str, list[float]]:
    """Return the metric's name and its values."""
    name, separator, listed = text.partition(":")
    if name not in ("loss", "step", "score"):
        raise MethodError(f"metrics is {text!r}; it begins with loss, step or score")
    if not separator:
        return name, [_metric_of(name, inputs, number) for number in range(len(inputs.adapters))]
    try:
        values = [float(value) for value in listed.split(",")]
    except ValueError:
        raise MethodError(f"metrics is {text!r}; after the colon it takes numbers with commas between them") from None
    if len(values) != len(inputs.adapters):
        raise MethodError(f"metrics has {len(values)} values for {len(inputs.adapters)} adapters; give one for each")
    return name, values


def _metric_of(name: str, inputs: Inputs, number: int) -> float:
    adapter = inputs.adapters[number]
    folder = folder_of(adapter)
    state = folder / "trainer_state.json" if folder is not None else None
    content = _state(state) if state is not None and state.is_file() else {}
    step = content.get("global_step")
    if not isinstance(step, int) and folder is not None:
        step = step_in_name(folder)
    if name == "step" and isinstance(step, int):
        return float(step)
    logged = content.get("log_history")
    if name == "loss" and isinstance(logged, list):
        losses = [
            entry["loss"]
            for entry in logged
            if isinstance(entry, dict)
            and isinstance(entry.get("loss"), int | float)
            and (not isinstance(step, int) or not isinstance(entry.get("step"), int | float) or entry["step"] <= step)
        ]
        if losses:
            return float(losses[-1])
    raise MethodError(
        f"{adapter.name} has no trainer_state.json beside it that tells its {name}; give the values: "
        f"--metrics {name}:1.9,1.7,…"
    )


def _state(path: Path) -> dict[str, Any]:
    return parse_object(read_whole(str(path), _LARGEST_STATE), str(path))
