"""Rows of an embedding for tokens that a model never saw, made from rows of another model that has them."""
