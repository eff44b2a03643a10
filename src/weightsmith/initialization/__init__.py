"""Adapters to begin a training with, made from the base's weights and, for some, from activations."""
