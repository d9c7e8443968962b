"""Helpers around a call: dense masks from a bias, packing of padded batches."""
