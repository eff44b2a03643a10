"""Adapters: small sets of weights that change a model's weights."""
