"""Pictures of queries: that what is drawn lies where the detector looked, for padded, resized and oblong images."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from ovdet2.config import load_config
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import UsageError
from ovdet2.modeling.build import build_teacher
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.position_encoding import level_masks
from ovdet2.predictor import Detector
from ovdet2.programs import draw_queries as tool
from ovdet2.report.query_pictures import SIDE, QueryView, draw_query, query_view, to_pixels
from ovdet2.vocabulary import Vocabulary
from tests.micro_detr import SIZES, small_transformer

STRIDES = (8, 16, 32, 64)


def test_a_location_of_the_padded_batch_is_a_pixel_of_the_photograph():
    """A photograph of 200 x 300 pixels, resized to 100 x 150 and padded to 128 x 256."""
    locations = torch.tensor([[0.0, 0.0], [150 / 256, 100 / 128], [75 / 256, 25 / 128], [1.0, 1.0]])
    pixels = to_pixels(locations, (128, 256), (100, 150), (200, 300))
    assert torch.allclose(pixels, torch.tensor([[0.0, 0.0], [300.0, 200.0], [150.0, 50.0], [512.0, 256.0]]))


def decoded(features, input_size, padded_size, transformer):
    """Outputs of a transformer for one image of a padded batch, as DeformableDETR names them."""
    shapes = [level.shape[-2:] for level in features]
    memory = transformer.encode(features, level_masks([input_size], padded_size, shapes))
    found = transformer.decode(memory, transformer.queries(memory), keep_sampling=True)
    sampling = found.sampling_locations, found.sampling_weights
    return DetrOutputs(found.hidden, found.boxes_cxcywh, found.hidden, found.references, *sampling)


def levels(height, width, padded_size=None, seed=0):
    """Features of an image's levels, random, and the same at the upper left of a padded batch."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(1, SIZES["dim"], height // s, width // s, generator=generator) for s in STRIDES]
    if padded_size is None:
        return maps
    padded = [torch.full((1, SIZES["dim"], padded_size[0] // s, padded_size[1] // s), 7.0) for s in STRIDES]
    for large, small in zip(padded, maps):
        large[..., : small.shape[2], : small.shape[3]] = small
    return padded


@torch.no_grad()
@pytest.mark.parametrize("variant", ["one_stage", "refine", "two_stage"])
def test_padding_moves_nothing(variant):
    torch.manual_seed(0)
    transformer = small_transformer(variant).eval()
    inside, padded, size = (128, 192), (192, 320), (256, 384)
    alone = decoded(levels(*inside), inside, inside, transformer)
    batch = decoded(levels(*inside, padded), inside, padded, transformer)
    for query in (0, 5):
        expected = query_view(alone, 0, query, inside, inside, size)
        found = query_view(batch, 0, query, padded, inside, size)
        for name in ("boxes_xyxy", "reference", "points", "weights"):
            assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-2), name
        assert found.boxes_xyxy.shape == (SIZES["decoder_layers"], 4)
        assert len(found.reference) == (2 if variant == "one_stage" else 4)
        assert torch.allclose(found.weights.sum(dim=(1, 2)), torch.ones(SIZES["heads"]), atol=1e-5)


@torch.no_grad()
def test_points_without_offsets_are_at_the_reference():
    """A query made to refer to a quarter of the width and to three quarters of the height, in a padded batch."""
    torch.manual_seed(0)
    transformer = small_transformer("one_stage").eval()
    transformer.query_maker.reference.weight.zero_()
    transformer.query_maker.reference.bias.copy_(torch.tensor([0.25, 0.75]).logit())
    for layer in transformer.decoder.layers:
        layer.cross_attn.sampling_offsets.weight.zero_()
        layer.cross_attn.sampling_offsets.bias.zero_()
    inside, padded, size = (128, 192), (192, 320), (64, 96)
    outputs = decoded(levels(*inside, padded), inside, padded, transformer)
    view = query_view(outputs, 0, 3, padded, inside, size)
    assert torch.allclose(view.reference, torch.tensor([24.0, 48.0]), atol=1e-4)
    assert torch.allclose(view.points, torch.tensor([24.0, 48.0]).expand_as(view.points), atol=1e-3)


def hand_made(**changes):
    """A query with one point that counts, at (90, 20) of an image of 120 x 60 pixels, and two layers."""
    points, weights = torch.full((1, 2, 1, 2), 30.0), torch.tensor([[[1.0], [0.0]]])
    points[0, 0, 0] = torch.tensor([90.0, 20.0])
    boxes = torch.tensor([[80.0, 30.0, 110.0, 50.0], [90.0, 35.0, 100.0, 45.0]])
    return QueryView(**{"boxes_xyxy": boxes, "reference": torch.tensor([60.0, 40.0]), "points": points,
                        "weights": weights, **changes})  # fmt: skip


def lit(picture, colour):
    """Bounding box (x0, y0, x1, y1) of the pixels near an RGB colour, in pixels of a picture 120 wide."""
    near = (np.abs(picture.astype(int) - np.array(colour)) < 40).all(axis=2)
    ys, xs = np.nonzero(near)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / (SIDE / 120)


def test_points_and_boxes_are_drawn_where_they_are():
    black = np.zeros((60, 120, 3), dtype=np.uint8)
    picture = draw_query(hand_made(), black)
    assert picture.shape == (SIDE // 2, 2 * SIDE, 3) and picture.dtype == np.uint8
    left, right = picture[:, :SIDE], picture[:, SIDE:]
    level, last = (255 * np.array(colormaps[name](at)[:3]) for name, at in (("cool", 0.15), ("viridis", 1.0)))
    first = 255 * np.array(colormaps["viridis"](0.15)[:3])
    body = slice(80, None)  # below the words that say what the colours mean
    assert np.allclose(lit(left[:, 300:], level) + [300 * 120 / SIDE, 0] * 2, [88.8, 18.8, 91.2, 21.2], atol=0.5)
    edge = 1.0  # half a line
    assert np.allclose(lit(right[body], last) + [0, 15] * 2, [90, 35, 100, 45], atol=edge)
    assert np.allclose(lit(right[body], first) + [0, 15] * 2, [80, 30, 110, 50], atol=edge)
    # The reference is a white cross, the point without weight invisible.
    assert np.allclose(lit(left[body], (255, 255, 255)) + [0, 15] * 2, [58.8, 38.8, 61.2, 41.2], atol=edge)
    assert left[150:170, 150:170].max() == 0


def test_a_reference_box_is_drawn_and_the_image_shows_through():
    grey = np.full((120, 60, 3), 200, dtype=np.uint8)
    view = hand_made(reference=torch.tensor([20.0, 60.0, 40.0, 90.0]), points=torch.full((1, 2, 1, 2), -9.0))
    picture = draw_query(view, grey, text="query 1: $5 note")
    assert picture.shape == (SIDE, SIDE, 3)
    assert np.allclose(lit(picture[120:, : SIDE // 2], (255, 255, 255)) + [0, 22.5] * 2, [20, 60, 40, 90], atol=1.5)
    assert (picture[400, 150] == 100).all()


def test_the_program_draws_the_best_queries(tmp_path, capsys):
    small = ["MODEL.DETR.DIM", "32", "MODEL.DETR.NUM_QUERIES", "8", "MODEL.VOCABULARY.TEMPLATES", "single"]
    small += ["MODEL.DEVICE", "cpu"]
    cfg = load_config("ovshapes/detr_text_r18.yaml", small)
    words = Vocabulary.build(["red star", "moon"], build_teacher(cfg), "single", [True, False])
    model = tool.OpenVocabularyDeformableDETR(cfg, vocabulary=words)
    AtomicCheckpointer(model, str(tmp_path)).save("model")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]
    arguments = ["--config-file", "ovshapes/detr_text_r18.yaml", "--input", str(tmp_path / "a.png")]
    arguments += ["--output", str(tmp_path / "out"), "--queries", "2"]
    written = tool.main([*arguments, *small, *weights])
    assert [path.name for path in written] == ["a_query1.png", "a_query2.png"]
    assert Image.open(written[0]).size == (2 * SIDE, SIDE * 60 // 100)
    said = capsys.readouterr().out
    # The best query is that of the best detection, and its last box is the detection's.
    predictor = Detector(cfg, str(tmp_path / "model.pth"))
    best = predictor.predict(pixels)[0]
    (view, text), *_ = tool.best_queries(predictor, pixels, 1)
    assert torch.allclose(view.boxes_xyxy[-1:], best.pred_boxes.tensor, atol=1e-3)
    assert text in said and text.endswith(f"{predictor.names[best.pred_classes]} {best.scores.item():.2f}")
    with pytest.raises(UsageError, match="no Deformable DETR"):
        tool.main(["--config-file", "ovshapes/vild_text_r18.yaml", *arguments[2:]])
