"""The recipe language: YAML text -> validated plain data. No file of weights is opened here."""
