"""Handling a model of the user's: calling, watching and copying it."""
