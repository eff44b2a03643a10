"""The commands of ``weightsmith adapter``: one file per verb."""
