"""Measurements of halfbyte beside its peers. Entry point: python -m benchmarks.run"""
