"""Prints what share of digits a model of the zoo classifies rightly, by task, for ``weightsmith curve --evaluate``.

python examples/zoo/score.py MODEL          # on the validation part, by which parameters are chosen
python examples/zoo/score.py MODEL test     # on the test part
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import weightsmith
from weightsmith.quickstart import accuracies


def main() -> None:
    model, part = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "validation"
    digits = weightsmith.open(Path(__file__).parent / f"digits-{part}.safetensors")
    print(json.dumps(accuracies(weightsmith.open(model), digits)))


if __name__ == "__main__":
    main()
