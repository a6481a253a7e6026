"""Kernels, one idea a file. Each says what it computes, what bounds it, and how it was checked."""
