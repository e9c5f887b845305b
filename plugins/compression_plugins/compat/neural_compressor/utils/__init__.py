"""Stands where Neural Compressor 2.6 has `utils`."""
