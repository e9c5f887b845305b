"""Deployed layers, one module for each kind."""
