"""Arithmetic on task vectors between bases, and interpolation between two models."""
