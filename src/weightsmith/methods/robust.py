"""Averages other than the arithmetic mean, and aggregates that a few bad models cannot spoil."""
