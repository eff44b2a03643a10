"""The kinds of adapters: one file per family, one small function per kind."""
