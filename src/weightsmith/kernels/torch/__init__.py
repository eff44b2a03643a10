"""The kernels' twins on PyTorch tensors, wherever those lie. Imported only where the torch backend is asked for."""
