"""The checkpoints of a training run: found, weighted, and averaged in time."""

from weightsmith.runs.average import RunAverage, average_run, choose
from weightsmith.runs.discovery import Run, Saved, find_run

__all__ = ["Run", "RunAverage", "Saved", "average_run", "choose", "find_run"]
