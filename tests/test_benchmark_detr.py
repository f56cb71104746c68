"""The benchmark of Deformable DETR at a small size: the models it compares give the same logits and boxes."""

import pytest
import torch

from ovdet2.bench import detr as bench


@pytest.mark.slow
def test_the_models_compared_are_equal_and_every_row_is_measured(capsys):
    models, images = (
        {"theirs": bench.their_model("refine"), "ours": bench.our_model("refine")},
        torch.randn(2, 3, 64, 96),
    )
    with torch.no_grad():
        logits, boxes = bench.their_outputs(models["theirs"].eval(), images)
        our_logits, our_boxes = bench.our_outputs(models["ours"].eval(), images)
    torch.testing.assert_close(our_logits, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(our_boxes, boxes, atol=1e-4, rtol=1e-4)
    frozen = {key: sum(p.numel() for p in model.parameters() if not p.requires_grad) for key, model in models.items()}
    trained = {key: sum(p.numel() for p in model.parameters() if p.requires_grad) for key, model in models.items()}
    assert frozen["ours"] == frozen["theirs"] > 0
    assert trained["ours"] == trained["theirs"] + 5 * 257 * 91  # theirs ties its class layers
    threads = torch.get_num_threads()
    results = bench.main(["--sizes", "64x64", "--batches", "1", "--turns", "1", "--threads", str(threads)])
    names = ("transformers", "ovdet2")
    assert set(results) == {("64x64", "1", what, name) for what in bench.PASSES for name in names}
    assert all(row.ratio > 0 and row.peak > 0 for row in results.values())
    assert capsys.readouterr().out.count("| 64x64 | 1 |") == 4
