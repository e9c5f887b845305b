"""Other libraries' interfaces, translated into this one's."""
