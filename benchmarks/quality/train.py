"""Train the models of the quality benchmark: of each zoo and seed a base, an expert for each task, and a joint model.

    PYTHONPATH=src python -m benchmarks.quality.train --models MODELS --data CACHE

A model that is there is not trained again. On one machine and with the same versions the files come out the same to
the byte. Needs torch, transformers and scikit-learn, and npm and pip for the data.
"""

from __future__ import annotations

import transformers

from benchmarks.quality.zoo import train
from benchmarks.quality.zoos import arguments, seeds


def main() -> None:
    """Train what is missing."""
    options = arguments(__doc__).parse_args()
    transformers.utils.logging.disable_progress_bar()
    for of_zoo in seeds(options).values():
        for seed in of_zoo:
            train(seed.zoo, seed.number, seed.folder, seed.data)


if __name__ == "__main__":
    main()
