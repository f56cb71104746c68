"""tools/benchmark_detr.py at a small size: the models it compares give the same logits and boxes."""

import benchmark_detr as tool
import pytest
import torch


@pytest.mark.slow
def test_the_models_compared_are_equal_and_every_row_is_measured(capsys):
    models, images = tool.both_models("refine"), tool.images_of("64x96", 2)
    with torch.no_grad():
        theirs, ours = models["theirs"].eval()(images), models["ours"].eval()(images, [(64, 96)] * 2)
    torch.testing.assert_close(ours["pred_logits"][-1], theirs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours["pred_boxes"][-1], theirs.pred_boxes, atol=1e-4, rtol=1e-4)
    frozen = {key: sum(p.numel() for p in model.parameters() if not p.requires_grad) for key, model in models.items()}
    trained = {key: sum(p.numel() for p in model.parameters() if p.requires_grad) for key, model in models.items()}
    assert frozen["ours"] == frozen["theirs"] > 0
    assert trained["ours"] == trained["theirs"] + 5 * 257 * 91  # theirs ties its class layers
    threads = torch.get_num_threads()
    results = tool.main(["--sizes", "64x64", "--batches", "1", "--turns", "1", "--threads", str(threads)])
    assert set(results) == {("64x64", 1, name) for name in tool.PASSES}
    for ratio, ours, theirs in results.values():
        assert ratio > 0 and ours > 0 and theirs > 0
    assert capsys.readouterr().out.count("| 64x64 | 1 |") == 2
