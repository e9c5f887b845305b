"""Layers that compute their forward with 8-bit integers while they train."""
