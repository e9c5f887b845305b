"""Plugins found, loaded, composed and called."""
