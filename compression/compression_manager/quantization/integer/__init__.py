"""Quantization-aware products on integers."""
