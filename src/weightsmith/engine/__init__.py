"""Runs a plan: reads blocks, computes, writes. Executors may differ; results do not."""
