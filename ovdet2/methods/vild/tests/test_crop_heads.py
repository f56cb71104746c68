"""CLIP on the boxes of a closed-set Faster R-CNN of Detectron2, from a file of its model zoo to detections."""

import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image

from ovdet2.config import check_methods, load_config
from ovdet2.errors import DataError, UsageError
from ovdet2.methods.vild.crop_heads import best_class_boxes
from ovdet2.predictor import Detector
from ovdet2.programs import import_detectron2
from ovdet2.programs.import_weights import main
from tests.oracles.formula import filled, uniform

CONFIG = "coco/clip_on_crops_r50.yaml"
SIDE = 128  # of the picture and of the network's input
NARROW = ["MODEL.TEACHER.ARCHITECTURE", "ovshapes-resnet", "MODEL.TEACHER.PRETRAINED", "embedded", "MODEL.DEVICE", "cpu",
          "MODEL.VOCABULARY.TEMPLATES", "single", "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8,
          "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
          "MODEL.RPN.POST_NMS_TOPK_TEST", 30, "TEST.DETECTIONS_PER_IMAGE", 10, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0,
          "INPUT.MIN_SIZE_TEST", SIDE]  # fmt: skip
GAINS = [
    ("stem.conv1.weight", 0.02),
    ("conv3.norm.weight", 0.3),
    ("anchor_deltas.weight", 0.1),
    ("bbox_pred.weight", 0.3),
]
BIAS = "roi_heads.box_predictor.bbox_pred.bias"


def reference():
    """Detectron2's detector of the same configuration, with weights by a formula."""
    cfg = load_config(CONFIG, NARROW)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = "GeneralizedRCNN", "StandardROIHeads"
    model = META_ARCH_REGISTRY.get("GeneralizedRCNN")(cfg).eval()
    weights = filled({name: value.shape for name, value in model.state_dict().items()}, GAINS)
    model.load_state_dict(weights)
    return model, weights


@pytest.fixture(scope="module")
def weights():
    return reference()[1]


def write(path, weights):
    """As a file of the model zoo, of a Mask R-CNN."""
    others = {"roi_heads.mask_head.predictor.weight": (80, 4, 1, 1), "pixel_mean": (3, 1, 1)}
    others["proposal_generator.anchor_generator.cell_anchors.0"] = (3, 4)
    arrays = {name: value.numpy() for name, value in weights.items()}
    arrays |= {name: np.ones(shape, np.float32) for name, shape in others.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    return str(path)


def imported(folder, weights):
    output = folder / "out.safetensors"
    file = write(folder / "model.pkl", weights)
    manifest = main(["--kind", "detectron2", "--config-file", CONFIG, "--output", str(output), file, *map(str, NARROW)])
    assert len(manifest["unused"]) == 3
    return output


@torch.no_grad()
def test_from_the_file_to_detections(weights, tmp_path):
    detector = Detector(CONFIG, imported(tmp_path, weights), NARROW, competitors="off")
    assert len(detector.names) == 80 and detector.model.vocabulary.num_base == 80 and detector.model.words_compete
    state = detector.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    picture = (255 * uniform("picture", (SIDE, SIDE, 3))).numpy().astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    detector.set_vocabulary("cat, teapot, red star")
    found = detector.predict(tmp_path / "photo.png")
    assert 0 < len(found) <= 10 and len(found.pred_boxes.tensor.unique(dim=0)) > 1
    # Scores: the root of o * p, with p of CLIP on the box's crop and o of the box. Two words of a box have one o.
    sample, heads = detector.prepare(tmp_path / "photo.png"), detector.model.roi_heads
    probs = heads._scorer(sample.image, found.pred_boxes.tensor)
    objectness = found.scores**2 / probs[torch.arange(len(found)), found.pred_classes]
    assert bool((objectness <= 1 + 1e-4).all()) and bool((objectness > 0).all())
    # Boxes and objectness are Detectron2's: those of the best classes of its proposals.
    model, _ = reference()
    images = model.preprocess_image([sample])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    levels = [features[name] for name in model.roi_heads.box_in_features]
    pooled = model.roi_heads.box_pooler(levels, [proposals[0].proposal_boxes])
    scores, deltas = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))
    boxes = model.roi_heads.box_predictor.predict_boxes((scores, deltas), proposals)[0].view(-1, 80, 4)
    softmax = scores.softmax(dim=1)
    for box, value in zip(found.pred_boxes.tensor, objectness):
        expected = boxes[range(len(boxes)), softmax[:, :80].argmax(dim=1)].clamp(0, SIDE)
        distances = (expected - box).abs().amax(dim=1)
        assert distances.min() < 1e-3 and abs(1 - softmax[distances.argmin(), 80] - value) < 1e-3


def test_the_box_of_the_best_class():
    boxes = torch.arange(24.0).view(2, 12)
    chosen, objectness = best_class_boxes(boxes, torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.2, 0.1, 0.2]]))
    assert chosen.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]] and torch.allclose(
        objectness, torch.tensor([0.6, 0.8])
    )
    only, _ = best_class_boxes(boxes[:, :4], torch.tensor([[0.1, 0.9], [0.2, 0.8]]))
    assert torch.equal(only, boxes[:, :4])
    assert best_class_boxes(boxes[:0], torch.zeros(0, 4))[0].shape == (0, 4)


def test_a_file_of_another_detector_is_refused(weights, tmp_path):
    """An unknown and a misshaped entry are named; tests/test_zoo_detic.py has the other cases of the same comparison."""
    changed = weights | {BIAS: torch.zeros(4), "surprise": torch.zeros(1)}
    shapes = rf"has other shapes: {BIAS} \(\[4\] in the file, \[320\] in the detector"
    with pytest.raises(DataError, match=f"has unknown entries: surprise; it {shapes}"):
        imported(tmp_path, changed)
    assert not (tmp_path / "out.safetensors").exists()


def test_settings_that_are_not_read_are_refused(tmp_path):
    for key, value in (("MODEL.MASK_ON", True), ("MODEL.OVD.SECONDARY_SCORES", "crops"), ("MODEL.VILD.WEIGHT", 0.5)):
        with pytest.raises(UsageError, match="CropROIHeads take all scores from CLIP"):
            check_methods(load_config(CONFIG, [key, value]))
    words = ["--output", str(tmp_path / "a.safetensors"), "x.pkl"]
    with pytest.raises(UsageError, match="has not MODEL.ROI_HEADS.NAME CropROIHeads"):
        import_detectron2.main(["--config-file", "ovshapes/vild_text_r18.yaml", *words])
    with pytest.raises(UsageError, match="name a .safetensors file"):
        import_detectron2.main(["--config-file", CONFIG, "--output", "a.pth", "x.pkl"])
