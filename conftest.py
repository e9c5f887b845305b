"""Runs the Python blocks of README.md and docs as tests (`make check`)."""

from __future__ import annotations

import torch
from sybil import Sybil
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

# Parallel test processes must not compete for the machine's cores.
torch.set_num_threads(1)

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
).pytest()
