"""Where tests of the torch backend run: on the CPU always, on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_gpu))
