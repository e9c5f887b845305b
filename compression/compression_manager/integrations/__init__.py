"""Adapters to libraries that the framework does not need itself; each is an extra."""
