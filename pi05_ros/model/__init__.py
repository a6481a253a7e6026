"""The exact pi0.5 (and pi0) computation in plain PyTorch: the reference every backend is proved against."""
