"""Operations and bytes are counted right; how fast the machine is, no test can know."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

import roofline
from measuring.models import WORKLOADS
from measuring.work import count_work


def test_a_product_counts_its_operations_and_bytes():
    a, b = torch.ones(8, 4), torch.ones(4, 6)
    work = count_work(lambda: a @ b)
    assert work.operations == 2 * 8 * 4 * 6
    assert work.product_bytes == 4 * (8 * 4 + 4 * 6 + 8 * 6)
    assert work.pass_bytes == 0


def test_other_operators_count_bytes_and_views_none():
    a, row = torch.ones(8, 4), torch.ones(1, 4).expand(8, 4)
    work = count_work(lambda: (a.T.reshape(-1).view(2, 16), a.add_(row)))
    copied, added = 2 * a.nbytes, a.nbytes + 16 + a.nbytes  # reads a and one row, writes a
    assert work.pass_bytes == copied + added
    assert work.operations == 0


def test_the_backward_pass_counts():
    weight = torch.ones(4, 6, requires_grad=True)
    loss = F.linear(torch.ones(8, 6), weight).sum()
    assert count_work(loss.backward).operations == 2 * 8 * 4 * 6


def test_a_convolution_counts():
    work = count_work(lambda: F.conv2d(torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3), padding=1))
    assert work.operations == 2 * (2 * 8 * 8) * 5 * 3 * 3 * 3


def test_products_of_integers_are_products():
    codes = torch.ones(32, 32, dtype=torch.int8)
    work = count_work(lambda: torch._int_mm(codes, codes))
    assert (work.operations, work.pass_bytes) == (0, 0)
    assert work.product_bytes == 2 * 32 * 32 + 4 * 32 * 32


def test_the_step_of_the_encoder_multiplies_what_its_sizes_say():
    workload = WORKLOADS["encoder"](8)
    samples, length, width = workload.inputs.shape
    rows = samples * length
    layer = 4 * width * width + 2 * width * 256  # 1 layer, 256 wide inside
    attention = 2 * 2 * samples * length * length * width
    expected = 2 * rows * layer + attention + 2 * samples * width * 10
    assert roofline.work_of(workload)["forward"]["operations"] == expected


def test_the_least_time_divides_by_the_peak_of_the_type():
    part = {"operations": 6 * 10**9, "product_bytes": 0, "pass_bytes": 10**9}
    work = {"forward": part, "backward": part, "optimizer": part}
    found = {"copy": 5.0, "triad": 10.0, "float32": 2.0, "int8": 6.0}
    least = roofline.least_milliseconds(work, found, "int8", "float32")
    assert least == pytest.approx(
        {"forward products": 1000, "backward products": 3000, "other operators": 300}
    )


def test_it_runs_and_reports(tmp_path, capsys):
    before, path = torch.get_num_threads(), tmp_path / "roofline.json"
    arguments = ["--megabytes", "4", "--side", "64", "--rounds", "3", "--threads", "1"]
    arguments += ["--shrink", "8"]
    try:
        document = roofline.main([*arguments, "--json", str(path)])
    finally:
        torch.set_num_threads(before)
    assert json.loads(path.read_text()) == document
    assert all(value > 0 for value in document["peaks"].values())
    assert "a float32 step of resnet" in capsys.readouterr().out
