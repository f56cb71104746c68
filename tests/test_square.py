"""Square input: padding of a batch, the two-stage hosts, and what is refused."""

import pytest
import torch
from detectron2.structures import ImageList

from ovdet2.config import get_cfg
from ovdet2.errors import UsageError
from ovdet2.methods.fvlm.tests import fvlm_cases
from ovdet2.methods.fvlm.tests.test_fvlm import losses
from ovdet2.modeling import FrozenVLMRCNN, OpenVocabularyRCNN
from ovdet2.modeling.detr.build import refuse_unused
from ovdet2.modeling.square import pad_to_square
from tests import micro


def test_padding_is_zeros_at_the_right_and_bottom():
    pixels = [micro.wave((3, 20, 50), 0.3), micro.wave((3, 64, 33), 0.4)]
    batch = ImageList.from_tensors(pixels, 32)  # 64 x 64
    square = pad_to_square(batch, 96)
    assert square.tensor.shape == (2, 3, 96, 96) and square.image_sizes == [(20, 50), (64, 33)]
    for index, image in enumerate(pixels):
        expected = torch.zeros(3, 96, 96)
        expected[:, : image.shape[1], : image.shape[2]] = image
        assert torch.equal(square.tensor[index], expected)
    with pytest.raises(UsageError, match="image of 64 px is larger than the square of INPUT.SQUARE, 32 px"):
        pad_to_square(batch, 32)


@torch.no_grad()
@pytest.mark.parametrize("kind", fvlm_cases.KINDS)
def test_the_network_sees_a_square(kind):
    """An image by itself has the features that it has in a batch of other sizes, in training and at test."""
    network, records = fvlm_cases.model(kind), micro.images(2)  # 64 x 96 and 80 x 64
    network.square, shapes = 128, []
    network.backbone.register_forward_pre_hook(lambda _, arguments: shapes.append(tuple(arguments[0].shape)))
    alone, both = network(records[:1])[0]["instances"], network(records)[0]["instances"]
    losses(network, records)
    assert shapes == [(1, 3, 128, 128), (2, 3, 128, 128), (2, 3, 128, 128)]
    assert torch.allclose(alone.scores, both.scores, atol=1e-4) and alone.image_size == (64, 96)


@torch.no_grad()
def test_positional_embeddings_of_a_vit_depend_on_it():
    """So region embeddings do, which is why the square is part of the recipe of F-ViT."""
    network, record = fvlm_cases.model("vit"), micro.images(1)
    box = [torch.tensor([[8.0, 8.0, 40.0, 40.0]])]
    rows = []
    for network.square in (0, 128):
        features = network.backbone(network._images(record).tensor)
        rows.append(network.backbone.embed_regions(features, box))
    assert (rows[0] * rows[1]).sum() < 0.999
    visual = network.backbone.trunk.visual
    assert network.backbone(network._images(record).tensor)["clip"].shape[2:] == (11, 11)  # 128 / 12, rounded up
    assert visual.positional_embedding.shape == (17, 32)


def test_by_configuration():
    words = ("DATASETS.TEST", ("ov_shapes_val_all",), "MODEL.VOCABULARY.TEMPLATES", "single", "INPUT.MAX_SIZE_TEST", 96)
    words += ("INPUT.MAX_SIZE_TRAIN", 96)
    assert FrozenVLMRCNN(fvlm_cases.cfg(*words, "INPUT.SQUARE", 128)).square == 128
    assert FrozenVLMRCNN(fvlm_cases.cfg(*words)).square == 0
    for keys, message in (
        (("INPUT.SQUARE", 100), "INPUT.SQUARE is 100: it must be 0 or a positive multiple of 32"),
        (("INPUT.SQUARE", -32), "INPUT.SQUARE is -32"),
        (("INPUT.SQUARE", 128, "INPUT.MAX_SIZE_TRAIN", 160), "at least INPUT.MAX_SIZE_TRAIN .160."),
        (("INPUT.SQUARE", 64), "at least INPUT.MAX_SIZE_TEST .96.[.]"),
        (
            ("INPUT.SQUARE", 128, "INPUT.LSJ.ENABLED", True, "INPUT.LSJ.SIDE", 160),
            "at least INPUT.LSJ.SIDE .160.",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            FrozenVLMRCNN(fvlm_cases.cfg(*words, *keys))


def test_the_other_hosts():
    config = micro.cfg()
    config.INPUT.SQUARE = 320
    assert OpenVocabularyRCNN(config, vocabulary=micro.vocabulary()).square == 320
    cfg = get_cfg()
    refuse_unused(cfg)
    cfg.INPUT.SQUARE = 320
    with pytest.raises(UsageError, match="OpenVocabularyDeformableDETR has no INPUT.SQUARE"):
        refuse_unused(cfg)
