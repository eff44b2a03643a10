"""The verbs of ``weightsmith adapter``, a module each."""
