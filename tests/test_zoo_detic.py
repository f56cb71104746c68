"""The zoo's records of Detic, CoDet and VLDet: files in their formats, filled by a formula, from import to detections."""

import functools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovdet2.config import load_config
from ovdet2.errors import DataError, UsageError
from ovdet2.io.weights import read_weights
from ovdet2.methods.detic import zoo_weights
from ovdet2.methods.detic.import_weights import our_name
from ovdet2.methods.detic.tests.test_detic_parity import require_equal
from ovdet2.predictor import Detector
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.word_lists import WordList
from ovdet2.zoo import DETECTORS, records, store
from tests.oracles import detic, detic_c4, detic_cases
from tests.oracles.formula import filled
from tests.test_zoo import Touch

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "coco_mini" / "val2017"
ASSETS = records.ASSETS.parent
PREDICTOR = "roi_heads.box_predictor"
# A teacher that comes with the package, narrow layers, small images, and no threshold: random scores are low.
TEACHER = ("MODEL.TEACHER.ARCHITECTURE", "ovshapes-resnet", "MODEL.TEACHER.PRETRAINED", "embedded")
FEW = (*TEACHER, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 20, "MODEL.DEVICE", "cpu")
FEW += ("MODEL.RPN.POST_NMS_TOPK_TEST", 40, "INPUT.MIN_SIZE_TEST", 160, "INPUT.MAX_SIZE_TEST", 320)
CASCADE = (*FEW, "MODEL.FPN.OUT_CHANNELS", 64, "MODEL.ROI_BOX_HEAD.FC_DIM", 32, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16)
C4 = (
    *FEW,
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    32,
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    8,
    "MODEL.RESNETS.WIDTH_PER_GROUP",
    8,
)
NARROW = {"detic-r18-21k": CASCADE, "detic-ovcoco-r50-image": C4, "codet-ovcoco-r50": C4, "vldet-ovcoco-r50": C4}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OVDET2_HOME", str(tmp_path / "home"))


@functools.cache
def narrow_record(name):
    """The record of a name with a narrow network."""
    record = records.RECORDS[name]
    return replace(record, overrides=record.overrides + NARROW[name], structure="narrow")


@functools.cache
def skeleton(name):
    """The state dict of a narrow detector without storage and words."""
    record = narrow_record(name)
    word = Vocabulary.build(["word"], Teacher.load("ovshapes-resnet", "embedded"), "single")
    state = zoo_weights.skeleton(load_config(record.config, record.overrides), word)
    return {name: value for name, value in state.items() if ".vocabulary." not in name}


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """Puts the narrow record of a name into the zoo."""

    def make(name, **changes):
        record = replace(narrow_record(name), **changes)
        monkeypatch.setitem(records.RECORDS, name, record)
        monkeypatch.setitem(DETECTORS, name, replace(DETECTORS[name], overrides=record.overrides))
        monkeypatch.setattr(records, "ASSETS", tmp_path)
        (tmp_path / "structures").mkdir()
        shapes = {name: tuple(value.shape) for name, value in skeleton(name).items()}
        records.structure_path("narrow").write_text(records.structure_text(shapes))
        return record

    return make


@functools.cache
def published(name):
    """The weights of a file under the published names, with all its tables of words, filled by a formula."""
    record = narrow_record(name)
    c4 = record.config.startswith("ovcoco")
    names = detic_c4.weight_shapes(80) if c4 else detic.weight_shapes("resnet18", 80)
    shapes = {name: skeleton(record.name)[ours].shape for name in names if (ours := our_name(name)) is not None}
    weights = filled(shapes, detic_cases.C4_GAINS.items() if c4 else detic_cases.gains("resnet18"))
    columns = record.options.get("columns") or len(zoo_weights.class_list(record.options["words"]).names)
    table = torch.cat([text_rows(columns).T, torch.zeros(128, 1)], dim=1)
    family = name.split("-")[0]
    for predictor in [PREDICTOR] if c4 else [f"{PREDICTOR}.{stage}" for stage in range(3)]:
        weights[f"{predictor}.cls_score.zs_weight"] = table
        weights[f"{predictor}.freq_weight"] = torch.zeros(columns)
        if family != "detic":  # a second table, of the words of captions
            weights[f"{predictor}.cls_score.detection_weight"] = table
            weights[f"{predictor}.cls_score.zs_weight"] = torch.zeros(128, 635)
        if family == "codet":
            for end in ("fc1", "fc2", "weight_transform.0", "weight_transform.2"):
                weights |= {f"{predictor}.{end}.weight": torch.zeros(1, 32), f"{predictor}.{end}.bias": torch.zeros(1)}
    tower = {"codet": "text_encoder.", "vldet": "rn50_model."}.get(family)
    return weights | ({f"{tower}text_projection": torch.zeros(4, 4)} if tower else {})


def text_rows(count):
    return F.normalize(torch.sin(torch.arange(count * 128.0) ** 1.1).view(count, 128), dim=1)


def write_as(form, weights, folder):
    """A file in one of the formats in which such weights are saved."""
    path = folder / f"weights.{'pkl' if form == 'pkl' else 'pth'}"
    if form == "pkl":
        arrays = {name: value.numpy() for name, value in weights.items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
        return path
    parallel = {f"module.{name}": value for name, value in weights.items()}
    content = {
        "detectron2": {"model": weights, "iteration": 9},
        "bare": weights,
        "parallel": {"model_state_dict": parallel},
    }
    torch.save(content[form], path)
    return path


def photo():
    paths = sorted(PHOTOS.glob("*.jpg"))
    if not paths:
        pytest.skip(f"{PHOTOS} has no photograph")
    return paths[0]


# A record, the form of its file, and how many of the default words had boxes.
FORMS = [
    ("detic-r18-21k", "detectron2", 1203),
    ("vldet-ovcoco-r50", "bare", 48),
    pytest.param("detic-ovcoco-r50-image", "pkl", 48, marks=pytest.mark.slow),
    pytest.param("codet-ovcoco-r50", "parallel", 48, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, form, with_boxes", FORMS)
def test_published_formats_import_and_predict(name, form, with_boxes, narrow, tmp_path):
    """No network, no CLIP, no data set: the default words come from the file."""
    record, weights = narrow(name), published(name)
    store.import_file(record, write_as(form, weights, tmp_path), accept_license=record.licence.non_commercial)
    assert store.verify(record) == store.FIRST_USE
    detector = Detector(name)
    bank, state = detector.model.vocabulary, detector.model.state_dict()
    words = zoo_weights.class_list(record.options["words"])
    assert detector.names == words.names and bank.num_base == with_boxes
    assert torch.allclose(bank.embeddings, text_rows(len(words.names)), atol=1e-6)
    # "couch" is no name of LVIS; reports list such words among the novel ones of another data set.
    assert ("couch" in bank.trained_base_names) == (name == "detic-r18-21k")
    assert all(torch.equal(state[our_name(name)], value) for name, value in weights.items() if our_name(name))
    image = photo()
    found = detector.predict(str(image))
    height, width = found.image_size
    boxes = found.pred_boxes.tensor
    assert len(found) == 20 and bool((boxes >= 0).all()) and bool((boxes <= torch.tensor([width, height] * 2)).all())
    assert found.has("pred_masks") == (name == "detic-r18-21k")
    detector.set_vocabulary("striped cat, teapot")
    assert set(detector.predict(str(image)).pred_classes.tolist()) <= {0, 1}


RPN, TABLE = "proposal_generator.rpn_head.conv.bias", f"{PREDICTOR}.cls_score.zs_weight"


@pytest.mark.parametrize("change, message", [
    ({RPN: None}, f"lacks weights: {RPN}"),
    ({"roi_heads.surprise": torch.zeros(1)}, "has unknown entries: roi_heads.surprise"),
    ({RPN: torch.zeros(63)}, rf"has other shapes: {RPN} \(\[63\] in the file, \[128\]"),
    ({TABLE: torch.ones(128, 66)}, "a table of 65 words, but 80 are expected"),
    ({TABLE: None}, "has no text classifier"),
    ({RPN: torch.full((128,), torch.nan)}, f"values that are not finite .{RPN}"),
])  # fmt: skip
def test_one_wrong_tensor_is_refused_by_name(change, message, narrow, tmp_path):
    record = narrow("detic-ovcoco-r50-image")
    weights = {name: value for name, value in (published(record.name) | change).items() if value is not None}
    with pytest.raises(DataError, match=message):
        store.import_file(record, write_as("detectron2", weights, tmp_path))
    assert not store.is_here(record) and not records.weights_path(record.name).exists()


@pytest.mark.parametrize("case", ["object", "cut", "page"])
def test_pickles_that_are_no_weights_are_refused(case, narrow, tmp_path):
    """As test_zoo.py for torch files, for those of Detectron2's model zoo."""
    record, path = narrow("detic-ovcoco-r50-image"), tmp_path / "weights.pkl"
    good = pickle.dumps({"model": {"a": np.zeros(5)}, "__author__": "someone"})
    path.write_bytes({
        "object": pickle.dumps({"model": Touch(tmp_path / "ran"), "__author__": "someone"}),
        "cut": good[: len(good) // 2],
        "page": b"<!DOCTYPE html><html></html>",
    }[case])  # fmt: skip
    expected = {"object": "could run code|names", "cut": "no complete pickle", "page": "is an HTML page"}[case]
    with pytest.raises(DataError, match=expected) as error:
        store.import_file(record, path)
    assert not (tmp_path / "ran").exists() and not store.is_here(record)
    assert not any(advice in str(error.value) for advice in ("weights_only", "unsafe", "allow_pickle", "trust"))


def test_vldet_must_be_accepted(narrow, tmp_path):
    record = narrow("vldet-ovcoco-r50")
    with pytest.raises(UsageError, match="must not be used commercially .CC BY-NC-SA 4.0"):
        store.import_file(record, write_as("bare", {"a": torch.zeros(1)}, tmp_path))


# --- words -----------------------------------------------------------------------------------------------------------


def test_class_lists():
    assert len(zoo_weights.class_list("lvis_base").names) == 866
    coco, open_coco, base = (zoo_weights.class_list(name) for name in ("coco", "ov_coco", "ov_coco_base"))
    assert (len(coco.names), len(open_coco.names), len(base.names)) == (80, 65, 48)
    assert list(open_coco.category_ids) == sorted(open_coco.category_ids)
    pairs = dict(zip(coco.category_ids, coco.names))
    assert all(pairs[number] == name for number, name in zip(open_coco.category_ids, open_coco.names))


@pytest.mark.parametrize("same", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_teacher_of_own_words_may_be_a_file(same, narrow, tmp_path):
    """Without network, a weight file of CLIP is compared with the embeddings that the detector's file has."""
    record = narrow("vldet-ovcoco-r50")
    weights = dict(published(record.name))
    if same:  # some words suffice
        names, teacher = zoo_weights.class_list("ov_coco").names[:12], Teacher.load("ovshapes-resnet", "embedded")
        table = weights[f"{PREDICTOR}.cls_score.detection_weight"].clone()
        table[:, :12] = Vocabulary.build(names, teacher, "openclip80").embeddings.T
        weights[f"{PREDICTOR}.cls_score.detection_weight"] = table
    store.import_file(record, write_as("bare", weights, tmp_path), accept_license=True)
    clip = tmp_path / "clip.safetensors"
    clip.write_bytes((ASSETS / "open_clip" / "ovshapes-resnet.safetensors").read_bytes())
    detector = Detector(record.name, overrides=["MODEL.TEACHER.PRETRAINED", str(clip)])
    if not same:
        with pytest.raises(
            DataError, match="embeds .* in another way .cosine .*give the weights of ovshapes-resnet, embedd"
        ):
            detector.set_vocabulary("teapot")
        return
    detector.set_vocabulary("teapot, cat")
    assert detector.names == ("teapot", "cat") and detector.model.vocabulary.teacher.pretrained == clip.name
    detector.set_vocabulary("dog")
    assert detector.names == ("dog",)


# --- full size -------------------------------------------------------------------------------------------------------

FULL = {"resnet18": "detic-r18-21k", "resnet50": "detic-ovlvis-r50-imagenet", "convnext_tiny": "detic-convnext-t-21k",
        "swin_base": "detic-swinb-21k", detic_cases.C4: "detic-ovcoco-r50-caption-image"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("trunk", FULL)
def test_full_size_files_have_the_detections_of_the_oracle(trunk, tmp_path, monkeypatch):
    """The parity of test_detic_parity.py by name, through a file of the published size and the zoo."""
    few = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", detic_cases.SHORT_SIDE[trunk], "INPUT.MAX_SIZE_TEST", 1333]
    if trunk == detic_cases.C4:
        few += ["MODEL.RPN.POST_NMS_TOPK_TEST", detic_cases.C4_PROPOSALS]
        few += ["TEST.DETECTIONS_PER_IMAGE", detic_cases.C4_DETECTIONS]
    else:
        few += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.02, "TEST.DETECTIONS_PER_IMAGE", detic_cases.DETECTIONS]
    record = replace(records.RECORDS[FULL[trunk]], options={"words": "made-up", "boxes": []})
    words = WordList(tuple(f"word {number}" for number in range(detic_cases.WORDS)))
    monkeypatch.setattr(zoo_weights, "class_list", lambda name: words)
    monkeypatch.setitem(records.RECORDS, record.name, record)
    rows = torch.cat([detic_cases.text().T, torch.zeros(512, 1)], dim=1)
    weights = {
        name: rows if name.endswith("zs_weight") else value for name, value in detic_cases.weights(trunk).items()
    }
    torch.save({"model": weights}, tmp_path / "file.pth")
    store.import_file(record, tmp_path / "file.pth")
    (tmp_path / "photo.jpg").write_bytes(detic_cases.picture())
    found = Detector(record.name, overrides=few).predict(tmp_path / "photo.jpg")
    require_equal(found, detic_cases.golden(trunk))
    assert (
        len(read_weights(records.weights_path(record.name))["model"])
        == len(records.read_structure(record.structure)) + 3
    )
