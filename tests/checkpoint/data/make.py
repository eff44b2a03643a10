"""Writes torch_2_13.bin; run once, with PyTorch 2.13.0."""

from pathlib import Path

import torch

matrix = torch.arange(24, dtype=torch.float32).reshape(4, 6)
state = {
    "matrix": matrix,
    "shared": matrix[1:3],
    "transposed": matrix.t(),
    "bfloat": (torch.arange(8) / 4).bfloat16().reshape(2, 4),
    "half": torch.arange(3).half(),
    "f8": torch.arange(4.0).to(torch.float8_e4m3fn),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
}
whole = {"epoch": 3, "state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(9.0)}}}, "loss": 0.5}
torch.save(whole, Path(__file__).parent / "torch_2_13.bin")
