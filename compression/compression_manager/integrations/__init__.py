"""Adapters to compilers and runtimes; those of torch itself, and of libraries that are extras."""
