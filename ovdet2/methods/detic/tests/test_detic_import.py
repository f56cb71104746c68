"""Import of published files by name and shape."""

import re

import pytest
import torch
from safetensors.torch import load_file

from ovdet2.config import load_config
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import DataError, UsageError
from ovdet2.methods.detic.import_weights import import_weights, our_name, unused_entries
from ovdet2.methods.detic.tests.detic_cases import TEACHER, own_weights, words
from ovdet2.methods.detic.tests.test_detic_parity import require_equal
from ovdet2.modeling import OpenVocabularyRCNN
from ovdet2.predictor import Detector
from ovdet2.programs import import_detic
from ovdet2.programs.import_weights import main
from tests.oracles import detic, detic_c4, detic_cases

PREDICTOR = "roi_heads.box_predictor"
# Entries that CoDet, VLDet and Detic's trainings add.
EXTRA = {
    **{f"{PREDICTOR}.{stage}.cls_score.detection_weight": (512, 21) for stage in range(3)},
    f"{PREDICTOR}.0.fc1.weight": (8, 8), f"{PREDICTOR}.0.fc2.bias": (1,), f"{PREDICTOR}.0.weight_transform.2.bias": (1,), f"{PREDICTOR}.0.freq_weight": (20,),
    f"{PREDICTOR}.1.prop_score.0.weight": (8, 8), "freq_weight": (20,), "pixel_mean": (3, 1, 1),
    "backbone.bottom_up.base.fc.weight": (11221, 4), "text_encoder.token_embedding.weight": (4, 4),
    "rn50_model.text_projection": (4, 4),
}  # fmt: skip


def file_of(path, changes=()):
    """A published file of an R18 detector, with some entries replaced."""
    torch.save({"model": detic_cases.weights("resnet18") | dict(changes), "iteration": 9}, path)
    return path


def shapes_of(trunk):
    shapes = detic_c4.weight_shapes(20) if trunk == detic_cases.C4 else detic.weight_shapes(trunk, 20)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("trunk", [*detic.TRUNKS, detic_cases.C4])
def test_every_weight_has_one_name_here(trunk):
    published = shapes_of(trunk)
    named = [name for name in published if our_name(name) is not None]
    assert len({our_name(name) for name in named}) == len(named)
    unused = [name for names in unused_entries(published).values() for name in names]
    assert sorted([*named, *unused]) == sorted(published)


def test_entries_that_only_training_uses_are_listed():
    weights = {name: torch.zeros(shape) for name, shape in EXTRA.items()}
    assert sorted(name for names in unused_entries(weights).values() for name in names) == sorted(EXTRA)
    assert all(our_name(name) is None for name in EXTRA)


class TestStrict:
    expected = {"a.weight": torch.zeros(2, 3), "b.bias": torch.zeros(4)}

    @pytest.mark.parametrize("changes, message", [
        ({"c.bias": torch.zeros(1)}, "has unknown entries: c.bias"),
        ({"a.weight": torch.zeros(3, 2)}, "has other shapes: a.weight ([3, 2] in the file, [2, 3] in the detector)"),
        ({"b.bias": None}, "lacks weights: b.bias"),
    ])  # fmt: skip
    def test_one_wrong_entry_is_named(self, changes, message):
        weights = {name: value for name, value in {**self.expected, **changes}.items() if value is not None}
        with pytest.raises(DataError, match=re.escape(message)):
            import_weights(weights, self.expected)

    def test_tied_weights_are_copied(self):
        tied = torch.zeros(2, 3)
        imported = import_weights({"a": tied, "b": tied}, {"a": tied, "b": tied})
        assert imported["a"].data_ptr() != imported["b"].data_ptr()


class TestProgram:
    CONFIG = ("--config-file", "lvis/detic_r18_21k.yaml")

    def test_from_file_to_detections(self, tmp_path, capsys, monkeypatch):
        """The parity of test_detic_parity.py through files, with the words in the file."""
        vocabulary = words(detic_cases.text())
        table = torch.cat([vocabulary.embeddings.T, torch.zeros(512, 1)], dim=1)
        # As CoDet and VLDet: the words of the detection are in a second table.
        extra = {name: table if "detection_weight" in name else torch.zeros(shape) for name, shape in EXTRA.items()}
        file_of(tmp_path / "r18.pth", extra)
        vocabulary.save(tmp_path / "words.safetensors")
        monkeypatch.setattr(import_detic, "load_vocabulary", lambda cfg, path: vocabulary)  # of a made-up teacher
        output = tmp_path / "out.safetensors"
        manifest = main(["--kind", "detic", *self.CONFIG, str(tmp_path / "r18.pth"), "--output", str(output),
                         "--vocabulary", str(tmp_path / "words.safetensors")])  # fmt: skip
        assert sum(map(len, manifest["unused"].values())) == len(EXTRA) + 3 and manifest["words"] == 20
        assert "not used: 3 entries, embeddings for the losses of CoDet and VLDet" in capsys.readouterr().out
        cfg = load_config("lvis/detic_r18_21k.yaml")
        cfg.MODEL.DEVICE, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = "cpu", 320, 1333
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 0.02, detic_cases.DETECTIONS
        detector = Detector(cfg, output)
        assert detector.names == vocabulary.names and detector.model.vocabulary.teacher == TEACHER
        (tmp_path / "photo.jpg").write_bytes(detic_cases.picture())
        require_equal(detector.predict(tmp_path / "photo.jpg"), detic_cases.golden("resnet18"))

    def test_without_words(self, tmp_path):
        output = tmp_path / "out.safetensors"
        manifest = main(["--kind", "detic", *self.CONFIG, str(file_of(tmp_path / "r18.pth")), "--output", str(output)])
        assert manifest["words"] is None and not any(".vocabulary." in name for name in load_file(output))
        cfg = load_config("lvis/detic_r18_21k.yaml", ["MODEL.DEVICE", "cpu"])
        detector = OpenVocabularyRCNN(cfg, vocabulary=words(detic_cases.text()))
        AtomicCheckpointer(detector).load_all(str(output))
        name = "roi_heads.box_predictor.1.cls_score.projection.weight"
        assert torch.equal(
            own_weights(detector)[name], detic_cases.weights("resnet18")[name.replace("projection", "linear")]
        )

    @pytest.mark.parametrize("changes, without, message", [
        ({"extra.weight": torch.zeros(1)}, (), "has unknown entries: extra.weight"),
        ({}, ("roi_heads.mask_head.predictor.bias",), "lacks weights: roi_heads.mask_head.predictor.bias"),
        ({"roi_heads.mask_head.predictor.bias": torch.zeros(2)}, (), "has other shapes: roi_heads.mask_head.predictor.bias"),
        ({}, tuple(f"{PREDICTOR}.{stage}.cls_score.zs_weight" for stage in range(3)), "no text classifier"),
    ])  # fmt: skip
    def test_another_file_is_refused_and_nothing_written(self, tmp_path, monkeypatch, changes, without, message):
        weights = {name: v for name, v in {**detic_cases.weights("resnet18"), **changes}.items() if name not in without}
        monkeypatch.setattr(import_detic, "read_weights", lambda path: {"model": weights})
        with pytest.raises(DataError, match=message):
            main(["--kind", "detic", *self.CONFIG, "r18.pth", "--output", str(tmp_path / "out.safetensors")])
        assert not (tmp_path / "out.safetensors").exists()

    def test_another_trunk_is_refused(self, tmp_path, monkeypatch):
        config = ("--config-file", "lvis/detic_convnext_t_21k.yaml")
        monkeypatch.setattr(import_detic, "read_weights", lambda path: {"model": detic_cases.weights("resnet18")})
        with pytest.raises(DataError, match="unknown entries.*lacks weights.*other shapes"):
            main(["--kind", "detic", *config, "r18.pth", "--output", str(tmp_path / "out.safetensors")])

    def test_another_configuration_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(import_detic, "read_weights", lambda path: {"model": detic_cases.weights("resnet18")})
        config = ("--config-file", "ovshapes/vild_text_r18.yaml")
        with pytest.raises(UsageError, match="no configuration of Detic"):
            main(["--kind", "detic", *config, "r18.pth", "--output", str(tmp_path / "out.safetensors")])


def test_other_words_are_refused():
    vocabulary = words(detic_cases.text())
    swapped = vocabulary.embeddings[[1, 0, *range(2, 20)]]
    import_detic.require_same_words(vocabulary, [vocabulary.embeddings, 1.0 * vocabulary.embeddings])
    with pytest.raises(DataError, match="another embedding of word [01], 'word [01]'"):
        import_detic.require_same_words(vocabulary, [vocabulary.embeddings, swapped])
    with pytest.raises(DataError, match="trained with 19 words of 512 dimensions"):
        import_detic.require_same_words(vocabulary, [vocabulary.embeddings[:-1]])
