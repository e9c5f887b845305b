"""A model as a graph that other runtimes take, and how such a graph is called."""
