"""Fuzzing: what strangers' files could do to the readers, tried by the million. See fuzz/run.py."""
