"""ViLD's benchmark at a small size: equal proposals, every detector is measured."""

import pytest
import torch

from ovdet2.methods.vild import bench


@pytest.mark.slow
def test_every_detector_is_measured(capsys):
    found = bench.main(["--sizes", "64x64", "--steps", "1", "--device", "cpu", "--no-memory"])
    assert list(found) == [("64x64", name) for name in (bench.PLAIN, *bench.VARIANTS)]
    assert all(row.ratio > 0 for row in found.values()) and found["64x64", bench.PLAIN].ratio == 1
    assert capsys.readouterr().out.count("| 64x64 |") == 4


@pytest.mark.slow
def test_trunk_and_rpn_are_the_same():
    plain, other = (bench.build(name, "cpu").model.state_dict() for name in (bench.PLAIN, "ViLD-ensemble"))
    names = [name for name in plain if "box_predictor" not in name]
    assert len(names) > 300 and all(torch.equal(plain[name], other[name]) for name in names)
