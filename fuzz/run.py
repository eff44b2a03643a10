"""Runs a fuzz target under atheris, a coverage-guided fuzzer for Python.

pip install atheris, beside weightsmith; then

    python fuzz/run.py TARGET --executions 1000000

Inputs that reach new code are kept in fuzz/corpus/TARGET, and one that shows a defect is written to
fuzz/found/TARGET; put it into tests/regressions/TARGET with the fix. Every input must end with weightsmith's own
errors or with a result that holds, within ten seconds of the processor's time and one gigabyte.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from random import Random
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
# Of the processor: a machine that is shared may stop for minutes, whatever the input.
_SECONDS = 10
# What ends an input that even that alarm does not reach.
_LAST_RESORT = 600
_MEGABYTES = 1024
# Where branches are counted. PyYAML, zipfile and json are not ours, and counting in them takes most of the time.
_INSTRUMENTED = ["weightsmith"]


def main() -> None:
    """Run one target until it has had so many inputs."""
    # Started as a file, Python looks for packages beside it, and not in the repository.
    sys.path.insert(0, str(ROOT))
    import atheris

    with atheris.instrument_imports(include=_INSTRUMENTED):
        from fuzz.target import Defect
        from fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--executions", type=int, default=100_000, help="inputs to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the fuzzer; 0 takes another each time")
    chosen = parser.parse_args()
    target = TARGETS[chosen.target]

    corpus, found = ROOT / "fuzz" / "corpus" / target.name, ROOT / "fuzz" / "found" / target.name
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(content)

    def mutate(content: bytes, largest: int, seed: int) -> bytes:
        random = Random(seed)
        # Half by the format's pieces, half by bits, as the fuzzer does by itself.
        changed = target.mutate(content, random) if seed % 2 else atheris.Mutate(content, largest)
        return bytes(changed)[:largest]

    def late(number: int, frame: FrameType | None) -> None:
        raise Defect(f"an input took more than {_SECONDS} seconds")

    def run(content: bytes) -> None:
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        target.run(content)
        signal.setitimer(signal.ITIMER_PROF, 0)

    signal.signal(signal.SIGPROF, late)
    settings = [
        f"-runs={chosen.executions}",
        f"-timeout={_LAST_RESORT}",
        f"-rss_limit_mb={_MEGABYTES}",
        "-max_len=8192",
        f"-artifact_prefix={found}/",
        f"-seed={chosen.seed}",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *settings, str(corpus)], run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
