"""Models that arrive one after the other."""
