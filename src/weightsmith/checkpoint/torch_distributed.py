"""Reads folders of torch.distributed.checkpoint without PyTorch."""

from __future__ import annotations

METADATA_FILE = ".metadata"
