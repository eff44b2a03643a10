"""Where tests of the torch backend run: on the CPU always, on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")))
