"""The Deformable DETR graph: parity with ``transformers``, padding, masks, permutations, gradients."""


import pytest
import torch

from tests.micro_detr import QUERIES, imported, published

SHAPES = [(8, 10), (4, 5), (2, 3), (1, 2)]


def padded_batch():
    """Images [2, 3, 96, 128] of sizes 96 x 90 and 70 x 128, zero where padded."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 96, 128, generator=generator, dtype=torch.float64)
    sizes = [(96, 90), (70, 128)]
    shown = torch.zeros(2, 96, 128, dtype=torch.long)
    for mask, (height, width) in zip(shown, sizes):
        mask[:height, :width] = 1
    return images * shown[:, None], shown, sizes


@pytest.mark.parametrize("variant", ["one_stage", "refine", "two_stage"])
def test_logits_and_boxes_equal_transformers(variant):
    theirs = published(variant)
    ours = imported(theirs)
    images, shown, sizes = padded_batch()
    with torch.no_grad():
        wanted = theirs(images, pixel_mask=shown)
        got = ours(images, sizes)
    if variant == "two_stage":
        # The published code lets tokens compete that cannot propose; here none of them won, or N would differ.
        valid = got["queries"].encoder_outputs.valid
        best = wanted.enc_outputs_class[..., 0].topk(QUERIES, dim=1).indices
        assert valid.gather(1, best).all()
        torch.testing.assert_close(got["queries"].references, wanted.init_reference_points, atol=1e-10, rtol=0)
    assert got["pred_logits"].shape == (1, 2, QUERIES, 7)
    torch.testing.assert_close(got["hidden"].transpose(0, 1), wanted.intermediate_hidden_states, atol=1e-8, rtol=0)
    torch.testing.assert_close(got["pred_logits"][-1], wanted.logits, atol=1e-8, rtol=0)
    torch.testing.assert_close(got["pred_boxes"][-1], wanted.pred_boxes, atol=1e-8, rtol=0)
