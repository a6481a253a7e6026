"""Training of small pi0.5 models by flow matching, from episodes on disk to a checkpoint."""
