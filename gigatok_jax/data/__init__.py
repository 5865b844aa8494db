"""Data loading: sources of labeled images, crops, and batches that resume exactly.

Nothing here uses JAX, because worker processes must not claim devices.
"""
