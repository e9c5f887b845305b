"""The options that benchmarks of models have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from measuring.models import WORKLOADS
from measuring.report import RESULTS


def model_parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser of what is measured and for how long, and where the results go.

    Args:
        description: the benchmark's documentation; its first line is shown.
        name: of the file of results.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument(
        "--seconds-per-model", type=float, help="stop timing a model after so long; default: never"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shrink", type=int, default=1, help="divide the sizes, for a quick look")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--chart", type=Path, help="an image to draw; needs matplotlib")
    return parser
