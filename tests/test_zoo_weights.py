"""The zoo with real networks: structures, and random files in official formats end to end."""

import argparse
import json
from dataclasses import replace

import numpy as np
import pin_zoo
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ovdet2.errors import DataError, UsageError
from ovdet2.predictor import Detector
from ovdet2.programs import predict
from ovdet2.vocabulary.word_lists import named_words
from ovdet2.zoo import records, store
from tests.file_host import Host, serving
from tests.micro_detr import QUERIES, SIZES, published
from tests.test_import_deformable_detr import as_before_version_5, as_detic, as_detrex, as_official, h_deformable_detr

# One record of each network: others have the same configuration and structure.
NETWORKS = {(record.config, str(record.overrides), record.structure): record for record in records.RECORDS.values()}
KEYS = {"dim": "DIM", "heads": "HEADS", "levels": "LEVELS", "points": "POINTS", "ffn_dim": "FFN_DIM"}
KEYS |= {"encoder_layers": "ENCODER_LAYERS", "decoder_layers": "DECODER_LAYERS"}
MICRO = [part for size, key in KEYS.items() for part in (f"MODEL.DETR.{key}", SIZES[size])]
MICRO += ["MODEL.DETR.NUM_QUERIES", QUERIES, "INPUT.MIN_SIZE_TEST", 96, "TEST.DETECTIONS_PER_IMAGE", 5]


@pytest.mark.parametrize("record", NETWORKS.values(), ids=lambda record: record.name)
def test_committed_structures_are_those_of_the_configurations(record):
    """A change of the network or of a configuration that published weights would no longer fit is found here."""
    assert pin_zoo.configured_structure(record) == records.read_structure(record.structure)


def test_every_committed_structure_is_of_a_record():
    committed = {path.stem for path in (records.ASSETS / "structures").glob("*.txt")}
    assert committed == {record.structure for record in records.RECORDS.values()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("OVDET2_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def model():
    """A small Deformable DETR of ``transformers`` with box refinement and a row of its class layers per COCO id."""
    return published("refine", classes=91).float()


@pytest.fixture(scope="module")
def refine(model):
    """Its weights."""
    return model.state_dict()


@pytest.fixture
def micro(refine, tmp_path, monkeypatch, home):
    """The record of the refined detector, with small sizes in its configuration and its structure."""
    name = "deformable-detr-r50-refine"
    record = replace(records.RECORDS[name], overrides=tuple(MICRO), structure="micro")
    monkeypatch.setitem(records.RECORDS, name, record)
    (tmp_path / "structures").mkdir()
    monkeypatch.setattr(records, "ASSETS", tmp_path)
    records.structure_path("micro").write_text(records.structure_text(pin_zoo.configured_structure(record)))
    from ovdet2.zoo import DETECTORS

    monkeypatch.setitem(DETECTORS, name, replace(DETECTORS[name], overrides=record.overrides))
    return record


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise).resize((160, 120)).save(path)
    return path


def write_as(form, weights, folder):
    """A file in one of the formats in which such weights are published."""
    if form == "safetensors":
        kept, seen = {}, set()
        for name, value in as_before_version_5(weights).items():  # tied tensors are saved once
            if value.data_ptr() not in seen:
                seen.add(value.data_ptr())
                kept[name] = value.contiguous()
        save_file(kept, folder / "model.safetensors")
        return folder / "model.safetensors"
    official = as_official(weights)
    if form == "detrex":  # a row for each of the 80 classes instead of one for each category id
        rows = [int(number) for number in named_words("coco").category_ids]
        renamed = as_detrex(weights).items()
        official = {
            "model": {name: value[rows] if "class_embed" in name else value for name, value in renamed},
            "iteration": 9,
        }
    elif form == "official":
        official = {"model": official, "epoch": 49, "args": argparse.Namespace(lr=2e-4)}
    torch.save(official, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


@pytest.mark.parametrize("form", ["official", "bare", "safetensors", "detrex"])
def test_official_formats_import_and_predict(form, model, refine, micro, photo, tmp_path):
    """The imported detector has the detections of the published one, among the rows of COCO's 80 classes."""
    file = write_as(form, refine, tmp_path)
    store.import_file(micro, file)
    assert store.verify(micro) == store.FIRST_USE
    detector = Detector(micro.name)  # without COCO's files
    assert len(detector.names) == 80 and detector.names[:2] == ("person", "bicycle")
    found = detector.predict(str(photo))
    assert len(found) == 5 and bool((found.scores > 0).all())
    sample, ids = detector.prepare(str(photo)), list(named_words("coco").category_ids)
    pixels = (sample.image - detector.model.pixel_mean) / detector.model.pixel_std
    with torch.no_grad():
        output = model(pixel_values=pixels[None])
    best = output.logits[0].sigmoid()[:, ids].flatten().topk(5)
    torch.testing.assert_close(found.scores, best.values, atol=1e-5, rtol=0)
    assert found.pred_classes.tolist() == (best.indices % 80).tolist()
    height, width = found.image_size
    x, y, w, h = output.pred_boxes[0][best.indices // 80].unbind(1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1) * torch.tensor([width, height] * 2)
    expected = boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    torch.testing.assert_close(found.pred_boxes.tensor, expected, atol=1e-3, rtol=0)
    [picture] = predict.main(["--model", micro.name, "--input", str(photo), "--output", str(tmp_path / "out")])
    assert picture.is_file() and json.loads((tmp_path / "out" / "detections.json").read_text())


@pytest.mark.parametrize("rename", [as_detic, as_detrex])
def test_files_with_a_row_per_class_must_have_the_classes_of_the_record(rename, refine, micro, tmp_path):
    """The first 80 of 91 rows, one for each category id, would be of other classes from "stop sign" on."""
    torch.save({"model": rename(refine)}, tmp_path / "file.pth")
    with pytest.raises(DataError, match="class layers have 91 rows, one for each class, but 80 classes are expected"):
        store.import_file(micro, tmp_path / "file.pth")


def test_h_deformable_detr_imports_and_predicts(home, photo, tmp_path, monkeypatch):
    """Of its queries, those that are matched one-to-many are dropped; WIDE_POSITION comes with the record."""
    real = records.RECORDS["h-deformable-detr-r50-12ep"]
    assert real.options == {"variant": "plus_plus", "num_queries": 300} and real.overrides == (
        "MODEL.DETR.WIDE_POSITION",
        True,
    )
    options = {**real.options, "num_queries": QUERIES}
    micro = replace(real, overrides=(*real.overrides, *MICRO), structure="micro", options=options)
    (tmp_path / "structures").mkdir()
    monkeypatch.setattr(records, "ASSETS", tmp_path)
    records.structure_path("micro").write_text(records.structure_text(pin_zoo.configured_structure(micro)))
    weights = {name: value.float() for name, value in h_deformable_detr(QUERIES + 8, classes=91).items()}
    torch.save({"model": weights}, tmp_path / "h.pth")
    path = store.import_file(micro, tmp_path / "h.pth")
    found = Detector(micro.config, path, micro.overrides).predict(str(photo))
    assert len(found) == 5 and bool((found.pred_classes < 80).all())
    with pytest.raises(DataError, match="the first 300 learned queries are requested, but the file has 20"):
        store.check_file(replace(micro, options=real.options), tmp_path / "h.pth")


def test_detic_s_deformable_detr_imports_and_predicts(home, photo, tmp_path, monkeypatch):
    """A closed set with a row for each class of LVIS."""
    real = records.RECORDS["detic-lvis-detr-r50"]
    record = replace(real, overrides=(*real.overrides, *MICRO), structure="micro")
    (tmp_path / "structures").mkdir()
    monkeypatch.setattr(records, "ASSETS", tmp_path)
    records.structure_path("micro").write_text(records.structure_text(pin_zoo.configured_structure(record)))
    weights = published("two_stage", classes=1203).float().state_dict()
    torch.save({"model": as_detic(weights), "iteration": 9}, tmp_path / "detic.pth")
    path = store.import_file(record, tmp_path / "detic.pth")
    detector = Detector(record.config, path, record.overrides)
    assert detector.names == named_words("lvis").names
    last = max(name for name in weights if "class_embed" in name and name.endswith("1.weight"))
    branches = [name for name in detector.model.state_dict() if name.endswith("class_branches.1.weight")]
    assert (
        torch.equal(detector.model.state_dict()[branches[0]], weights[last]) and len(detector.predict(str(photo))) == 5
    )


def test_a_photograph_is_predicted_by_name_with_a_download(refine, micro, photo, tmp_path, monkeypatch):
    """What a new user does: one line, which downloads, converts and loads."""
    host = Host(write_as("official", refine, tmp_path).read_bytes())
    with serving(host) as address:
        served = replace(micro.sources[0], url=f"{address}/checkpoint.pth")
        monkeypatch.setitem(records.RECORDS, micro.name, replace(micro, sources=(served,)))
        first = Detector(micro.name).predict(str(photo))
    again = Detector(micro.name).predict(str(photo))  # the host is gone
    assert torch.equal(first.scores, again.scores) and len(host.requests) == 1


def test_weights_that_forbid_commercial_use_must_be_accepted(refine, micro, photo, tmp_path, monkeypatch):
    """Detector and ovdet2 predict pass the acceptance on; without it, nothing is downloaded."""
    host = Host(write_as("official", refine, tmp_path).read_bytes())
    with serving(host) as address:
        served = replace(micro.sources[0], url=f"{address}/checkpoint.pth")
        licence = replace(micro.licence, weights="CC BY-NC 4.0", non_commercial=True)
        monkeypatch.setitem(records.RECORDS, micro.name, replace(micro, sources=(served,), licence=licence))
        with pytest.raises(UsageError, match="must not be used commercially"):
            Detector(micro.name)
        words = ["--model", micro.name, "--input", str(photo), "--output", str(tmp_path / "out")]
        with pytest.raises(UsageError, match="must not be used commercially"):
            predict.main(words)
        assert not host.requests
        predict.main([*words, "--accept-license"])
        assert Detector(micro.name, accept_license=True).names[0] == "person"
    assert len(host.requests) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", "1 missing weights .transformer.encoder.layers.1.ffn.linear2.bias"),
        ("extra", "1 unknown weights .transformer.surprise"),
        ("shape", "1 weights of another shape .neck.levels.0.1.weight"),
        ("size", "network.transformer.level_embed .4, 32., expected .4, 256."),
        ("variant", "a Deformable DETR of the variant 'refine', not 'two_stage'"),
    ],
)
def test_one_wrong_tensor_is_refused(change, message, refine, micro, tmp_path):
    weights = as_official(refine)
    if change == "missing":
        del weights["transformer.encoder.layers.1.linear2.bias"]
    elif change == "extra":
        weights["transformer.surprise"] = torch.zeros(1)
    elif change == "shape":
        weights["input_proj.0.1.weight"] = weights["input_proj.0.1.weight"][:5]
    elif change == "size":  # a complete detector, but of other sizes than the record's
        records.structure_path("micro").write_text(
            records.structure_text(records.read_structure("micro") | {"network.transformer.level_embed": (4, 256)})
        )
    else:
        micro = replace(micro, options={"variant": "two_stage"})
    torch.save({"model": weights}, tmp_path / "file.pth")
    with pytest.raises(DataError, match=message):
        store.import_file(micro, tmp_path / "file.pth")
    assert not store.is_here(micro) and not records.weights_path(micro.name).exists()
