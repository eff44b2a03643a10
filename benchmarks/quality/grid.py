"""Which settings of every method are tried: one plain table, published defaults and a small grid for each.

*Published* are the values that the method's authors give as their default or use without tuning; where a method
leaves one open (a weight for each task vector, above all), it is what they name for merging several models. The *grid*
is every combination of the values listed, in place of the published ones. The setting that is best on the validation
part is reported on the test part, beside the published one.

A method that is registered and is neither here nor in :data:`EXCEPTIONS` fails a test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.quality.schemes import Scheme
from weightsmith.methods.registry import all_methods

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A row of the tables.

    Attributes:
        published: the parameters at published defaults, as :func:`weightsmith.merge` takes them.
        grid: parameter -> values to try; of several parameters every combination.
        method: the registered method's name, if the row is not called so.
        scheme: which models it merges.
    """

    published: Parameters = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    method: str = ""
    scheme: Scheme = "all"

    def settings(self) -> list[Parameters]:
        """Return the published parameters, then those of the grid that differ from them."""
        points = [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]
        found: list[Parameters] = [dict(self.published)]
        for point in points:
            setting = {**self.published, **point}
            if setting not in found:
                found.append(setting)
        return found


# The weight of each task vector where task vectors are summed: 1/6 is their mean.
_WEIGHTS = (0.15, 0.2, 0.3, 0.4, 0.5)
# The factor on what TIES and its like have merged, which is of the size of one task vector.
_FACTORS = (0.5, 0.75, 1.25, 1.5)

# Row -> what is tried.
GRID: dict[str, Entry] = {
    # Wortsman et al.: the uniform soup has no parameter.
    "linear": Entry({"weight": 1.0}),
    "geometric": Entry({}, {"mixed": ("mean", "zero", "sign")}),
    "harmonic": Entry({}, {"mixed": ("mean", "zero", "sign")}),
    # Tian et al.'s simulator adds 1e-4 to both variances; 0 corrects in full.
    "variance_corrected": Entry({}, {"eps": (1e-4, 0.0), "vectors": (False, True)}),
    # Aggregates for models of which some are bad, where none is: of six, one may be.
    "median": Entry(),
    "trimmed_mean": Entry({"trim": 1}, {"trim": (1, 2)}),
    "krum": Entry({"byzantine": 1, "select": 1}, {"select": (1, 2, 3, 5)}),
    "geometric_median": Entry(),
    # No parameters of weight in mergekit's use; the tangent is the one thing that can differ.
    "multislerp": Entry({"weight": 1.0}, {"tangent": ("log", "projection")}),
    "karcher": Entry(),
    # Ilharco et al.: 0.3 to 0.4 for several tasks without tuning, else 0 to 1 in steps of 0.05.
    "task_arithmetic": Entry({"weight": 0.3}, {"weight": _WEIGHTS}),
    # Yadav et al.: top 20 %, trimmed over the whole model, factor 1 without a validation set.
    "ties": Entry(
        {"weight": 1.0, "density": 0.2, "trim_scope": "model"},
        {"density": (0.2, 0.5), "lambda_": (0.5, 1.0, 1.5)},
    ),
    # Davari and Belilovsky's starting point, by their code: of each row the largest 0.6 % go, the next 15 % stay.
    "breadcrumbs": Entry(
        {"weight": 0.2, "density": 0.15, "gamma": 0.006, "trim_scope": "row"},
        {"density": (0.15, 0.9), "weight": (0.2, 0.3, 0.5)},
    ),
    # mergekit's; the factor is that of TIES.
    "breadcrumbs_ties": Entry(
        {"weight": 1.0, "density": 0.15, "gamma": 0.006, "normalize": True},
        {"density": (0.15, 0.5), "lambda_": (0.5, 1.0, 1.5)},
    ),
    # Yu et al.: drop rate 0.2 in their merging examples.
    "dare_linear": Entry(
        {"weight": 0.3, "density": 0.8},
        {"density": (0.8, 0.5), "weight": (0.15, 0.2, 0.3)},
    ),
    "dare_ties": Entry(
        {"weight": 1.0, "density": 0.8, "normalize": True},
        {"density": (0.8, 0.5), "lambda_": (0.5, 1.0, 1.5)},
    ),
    # Deep et al.: drop rate 0.3, window 0.14 (epsilon is half of it), factor 1.1.
    "della": Entry(
        {"weight": 1.0, "density": 0.7, "epsilon": 0.07, "lambda_": 1.1},
        {"density": (0.7, 0.4), "lambda_": (0.5, 0.75, 1.1)},
    ),
    "della_linear": Entry(
        {"weight": 0.3, "density": 0.7, "epsilon": 0.07},
        {"density": (0.7, 0.4), "weight": (0.15, 0.2, 0.3)},
    ),
    # Wan et al.: the 10 % that vary most.
    "sce": Entry({"select_topk": 0.1}, {"select_topk": (0.1, 0.2, 0.5, 1.0)}),
    # Du et al.: the default of their function.
    "pcb": Entry({"density": 0.1}, {"density": (0.1, 0.3), "lambda_": (0.5, 1.0, 1.5)}),
    # Wang et al. choose the factor by data; without, that of task arithmetic.
    "consensus": Entry({"k": 2, "lambda_": 0.3}, {"k": (1, 2), "lambda_": (0.2, 0.3, 0.5)}),
    # He et al., without data: the largest 5 %.
    "localize_and_stitch": Entry({"density": 0.05}, {"density": (0.05, 0.2), "lambda_": (0.5, 1.0, 1.5)}),
    # Huang et al. have no parameters; here the unified vector alone, which is not how they use it.
    "emr": Entry({}, {"lambda_": (0.3, 0.5, 0.75)}),
    # Marczak et al.
    "magmax": Entry({"lambda_": 0.5}, {"lambda_": (0.25, 0.5, 0.75, 1.0)}),
    # Baselines.
    "sign_only": Entry({}, {"lambda_": (0.3, 0.5, 0.75)}),
    "random_select": Entry(),
    "ram": Entry(),
    "ramplus_tl": Entry({"r": 0.1, "alpha": 0.2}, {"r": (0.05, 0.2), "alpha": (0.1, 0.4)}),
    "model_stock": Entry({}, {"filter_wise": (False, True)}),
    # Yu et al.: a column above the mean rank counts in full.
    "widen": Entry({"ratio": 1.0, "score": 1.0}, {"ratio": (1.0, 2.0), "score": (0.25, 0.5, 1.0)}),
    # Tang et al.
    "opcm": Entry({"alpha": 0.5}, {"alpha": (0.25, 0.5, 0.75)}),
    # Stojanovski et al. search the momentum, near 1, for the steps of a training; six experts are few.
    "ema": Entry({"momentum": 0.9}, {"momentum": (0.5, 0.7, 0.8, 0.9)}),
    # Gargiulo et al. search the factor from 0.1 to 3; 1 without data.
    "tsv": Entry({"lambda_": 1.0}, {"lambda_": (0.5, 0.75, 1.0, 1.5, 2.0)}),
    # Marczak et al. search the factor from 0.1 to 3, and name none without data.
    "iso_c": Entry({"lambda_": 1.0}, {"lambda_": (0.5, 0.75, 1.0, 1.5, 2.0)}),
    "iso_cts": Entry({"lambda_": 1.0, "common_space_fraction": 0.8}, {"lambda_": (0.5, 0.75, 1.0, 1.5, 2.0)}),
    # Lee et al.: 40 % of the nuclear norm, no factor.
    "star": Entry({"eta": 40.0}, {"eta": (40.0, 70.0), "lambda_": (1.0, 1.5, 2.0)}),
    # Stoica et al.: trimmed over the model, factor 0.6 for eight image tasks; with DARE 0.4, for language models.
    "knots": Entry(
        {"density": 0.2, "lambda_": 0.6, "trim_scope": "model"},
        {"density": (0.2, 0.5), "lambda_": (0.6, 1.0, 1.5)},
    ),
    "knots_dare": Entry({"density": 0.2, "lambda_": 0.4}, {"density": (0.2, 0.8), "lambda_": (0.4, 0.8, 1.2)}),
    # Half of the energy, as LoRE-Adapt has it for one model; the weight is that of task arithmetic.
    "low_rank": Entry({"weight": 0.3, "energy": 0.5}, {"energy": (0.5, 0.9), "weight": (0.2, 0.3, 0.5)}),
    # Skorobogat et al. boost the sum; what it is multiplied with is searched.
    "subspace_boosting": Entry({"beta": 0.01}, {"beta": (0.01, 0.1), "lambda_": (0.1, 0.2, 0.4)}),
    # Two models; the rows of other methods on the same pairs are there to compare with.
    "linear, pairs": Entry({"weight": 1.0}, method="linear", scheme="pairs"),
    "task_arithmetic, pairs": Entry(
        {"weight": 0.4}, {"weight": (0.3, 0.4, 0.5, 0.6, 0.8)}, method="task_arithmetic", scheme="pairs"
    ),
    "slerp": Entry({"t": 0.5}, {"t": (0.3, 0.4, 0.6, 0.7)}, scheme="chained pairs"),
    "nuslerp": Entry({"weight": 1.0}, {"nuslerp_flatten": (True, False)}, scheme="pairs"),
    "nearswap": Entry({"t": 0.001}, {"t": (0.001, 0.003, 0.01, 0.03, 0.1)}, scheme="chained pairs"),
    "arcee_fusion": Entry(scheme="chained pairs"),
    # One expert's change, put onto another: published in full; RE-Adapt halves both.
    "transfer": Entry(
        {"lambda_": 1.0}, {"lambda_": (0.5, 1.0), "target_share": (0.5, 1.0)}, scheme="transferred pairs"
    ),
    # One fine-tune and its base. Wortsman et al.: half way.
    "interpolate": Entry({"lambda_": 0.5}, {"lambda_": (0.3, 0.5, 0.7, 0.85)}, scheme="single"),
    # Lin et al. hold the mean ratio at 0.2; the layers' ratios, which they search for, are equal here.
    "ama": Entry(
        {"ratio": 0.2, "mean_ratio": 0.2}, {"ratio": (0.1, 0.2, 0.4), "mixed": ("linear", "all")}, scheme="single"
    ),
    # Wu et al.: 0.2 is said to be the best.
    "timber": Entry({"gamma": 0.2}, {"gamma": (0.0, 0.2, 0.5)}, scheme="single"),
    # Yuan et al.: a fifth dropped, then the average.
    "imm": Entry({"drop": 0.2, "share": 0.5}, {"share": (0.3, 0.5, 0.7, 0.85)}, scheme="single"),
}

# Registered method -> why it has no row.
EXCEPTIONS: dict[str, str] = {
    "passthrough": "copies one model; its row would be that model's",
    "sparse_soup": "of models that nobody pruned it is linear",
    "metric_weighted": "weighs checkpoints by a metric that they share, and experts of different tasks share none",
    "bcwi": "without importances, which need gradients, it is interpolate with lambda = 1 - alpha",
    "rws": "needs one model trained on clean data and others on corrupted, all from one pretrained model",
    "rws_signature": "gives a difference of weights, not a model",
}


def unlisted() -> list[str]:
    """Return the registered methods that are neither in the table nor an exception; those of plugins do not count."""
    listed = {entry.method or name for name, entry in GRID.items()} | set(EXCEPTIONS)
    own = [one.name for one in all_methods().values() if one.function.__module__.startswith("weightsmith.")]
    return [name for name in own if name not in listed]
