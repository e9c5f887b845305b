"""Kinds of teachers, and how a teacher is run."""
