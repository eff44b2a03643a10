"""Times orthogonal matching pursuit, by which new rows of an embedding are rebuilt from anchors, against the plain way.

The donor's rows are random with a spectrum that falls off, in groups, with norms that differ: as embeddings are. Some
targets are rebuilt; the time of the last batch gives the rate, and what remains of the whole is what is done once (to
read the anchors and to make their Gram matrix). From both follows the time that all targets would take. The plain way
takes the inner products of all residuals with all anchors by BLAS before each pick; one such step is timed.

    python benchmarks/transplant.py                                       # a hundredth: seconds
    python benchmarks/transplant.py --anchors 50000 --width 4096 --targets 3072 --of 100000
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from weightsmith.checkpoint.tensor import Array
from weightsmith.engine.threads import ThreadMapper, default_threads
from weightsmith.transplantation.dictionary import Dictionary
from weightsmith.transplantation.pursuit import ANCHORS, MEMORY, matching_pursuit
from weightsmith.transplantation.rows import Rows


def make_rows(count: int, width: int, seed: int = 0) -> Array:
    """Return rows like an embedding's: ``[count, width]`` float32."""
    random = np.random.default_rng(seed)
    spectrum = (1 + np.arange(width, dtype=np.float32)) ** -0.25
    groups = random.standard_normal((max(count // 50, 1), width), np.float32) * spectrum
    rows = np.empty((count, width), np.float32)
    for start in range(0, count, 4096):
        part = rows[start : start + 4096]
        part[:] = random.standard_normal(part.shape, np.float32)
        part *= spectrum
        part += groups[random.integers(0, len(groups), len(part))]
        part *= random.lognormal(0, 0.3, (len(part), 1)).astype(np.float32) / np.sqrt(width)
    return rows


def clocks() -> Array:
    """Return seconds by the clock and of all processors: ``[2]``."""
    return np.array([time.perf_counter(), time.process_time()])


def plain_step(rows: Array, targets: Array, threads: int) -> Array:
    """Return the seconds that one pick takes for every target, the plain way."""
    with ThreadMapper(threads, matrices=True) as mapper:
        dictionary = Dictionary(rows, np.ones(len(rows)), 0)
        started = clocks()
        products = dictionary.products(targets, mapper)
        for _ in mapper(lambda row: int(np.abs(row).argmax()), products):
            pass
        return (clocks() - started) / len(targets)


def main() -> None:
    """Make the rows, rebuild some of them, and print what that says of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchors", type=int, default=5000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--targets", type=int, default=1536, help="rebuilt and timed")
    parser.add_argument("--of", type=int, default=100_000, help="targets to project the time for")
    parser.add_argument("--count", type=int, default=ANCHORS, help="anchors for each target")
    parser.add_argument("--nearest", type=int, help="pick among so many nearest anchors only")
    parser.add_argument("--memory", type=float, default=MEMORY / 1e9, help="GB")
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    anchors, count = arguments.anchors, arguments.count
    rows = make_rows(anchors + arguments.targets, arguments.width)
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = [(clocks(), 0)]
    found = matching_pursuit(
        Rows(rows),
        np.arange(anchors),
        np.arange(anchors, len(rows)),
        count=count,
        nearest=arguments.nearest,
        memory=int(arguments.memory * 1e9),
        threads=arguments.threads,
        progress=lambda n: done.append((clocks(), done[-1][1] + n)),
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Of several batches the first one pays for what is done once.
    steady = done[1] if len(done) > 2 else done[0]
    each = (done[-1][0] - steady[0]) / (done[-1][1] - steady[1])
    once = np.maximum(done[-1][0] - done[0][0] - each * arguments.targets, 0)
    plain = plain_step(rows[:anchors], rows[-min(256, arguments.targets) :], arguments.threads) * count
    print(f"{anchors:,} anchors x {arguments.width:,}, {count} each, {arguments.threads} threads")
    print(f"residual: {np.median(found.residual):.4f} (median of {arguments.targets:,} targets)")
    # The kernel counts in units of 1024 bytes. The rows themselves would be on disk.
    print(f"peak memory: {peak * 1024 / 1e9:.2f} GB, of which {made * 1024 / 1e9:.2f} were there before")
    # On a machine that has nothing else to do both say the same, unless threads wait for each other.
    for place, name, share in (
        (0, "by the clock", 1),
        (1, "by processors, shared among the threads", arguments.threads),
    ):
        first, rate, slow = once[place] / share, share / each[place], share / plain[place]
        ours, theirs = (first + arguments.of / rate) / 60, arguments.of / slow / 60
        print(
            f"{name}: once {first:.1f} s, then {rate:,.1f} targets a second: {arguments.of:,} in {ours:.1f} minutes; "
            f"the plain way {slow:,.1f} a second, {theirs:.1f} minutes, {theirs / ours:.1f} times as long"
        )


if __name__ == "__main__":
    main()
