"""How ops run on a GPU: Triton kernels and their launchers, one file an op.

Triton is imported inside functions only, so that importing halfbyte costs nothing and works where Triton is missing.
"""
