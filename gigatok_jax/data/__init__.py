"""Images in: sources of labelled images, crops, and batches that resume exactly.

This package never imports JAX by itself: its worker processes stay light.
"""
