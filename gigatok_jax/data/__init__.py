"""Data loading: sources of labelled images, crops, and batches that resume exactly.

Nothing here uses JAX, because worker processes must not claim devices.
"""
