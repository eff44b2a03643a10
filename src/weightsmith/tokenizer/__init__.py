"""Vocabularies and chat templates."""
