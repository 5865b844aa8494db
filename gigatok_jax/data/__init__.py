"""Data loading: sources of labelled images, crops, and batches that resume exactly.

This package does not import JAX, so that its worker processes start fast and use little memory.
"""
