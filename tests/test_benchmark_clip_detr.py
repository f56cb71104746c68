"""CLIP-DETR's benchmark at a small size: every combination is measured, with the same detector."""

import pytest
import torch

from ovdet2.bench.harness import Benchmark
from ovdet2.methods.clip_detr import bench


@pytest.mark.slow
def test_every_combination_is_measured(capsys):
    options = ["--size", "64x64", "--batch", "1", "--objects", "2", "--turns", "1", "--device", "cpu"]
    found = bench.main([*options, "MODEL.DETR.DIM", "32"])
    rows = {key[-1]: row for key, row in found.items()}
    assert set(rows) == set(bench.PARTS) and rows[bench.ALONE].ratio == 1
    assert all(row.ratio > 0 and row.peak > 0 for row in rows.values())
    assert capsys.readouterr().out.count("| both |") == 1


@pytest.mark.slow
def test_the_detector_is_the_same():
    args = Benchmark("", "", bench.OPTIONS, bench.plan).parse(["--device", "cpu", "MODEL.DETR.DIM", "32"])
    alone, both = (bench.build(args, name).model.state_dict() for name in (bench.ALONE, "both"))
    assert len(both) > len(alone) and all(torch.equal(both[name], value) for name, value in alone.items())
