"""Detic's losses on tags and captions: settings, concepts, the part of a detector."""

import pytest
import torch

from ovdet2.config import check_methods, load_config
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.data.samples import CAPTIONS, IMAGE_LABELS
from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps.texts import AttachTexts
from ovdet2.errors import UsageError
from ovdet2.evaluation.training_setting import setting_of
from ovdet2.methods.detic.losses import DeticTexts, concepts, detic_steps, rows_of
from ovdet2.modeling.weak.samplers import MaxSize
from ovdet2.ov_shapes.world.classes import BASE_NAMES, CLASS_NAMES, NOVEL_NAMES
from ovdet2.vocabulary.bank import WordBank
from tests import micro
from tests.test_rcnn import losses
from tests.weak_cases import captioned

TAGS, BOTH = "ovshapes/detic_tags_r18.yaml", "ovshapes/detic_both_r18.yaml"


def test_concepts_are_the_words_of_the_data_set_with_synonyms(tmp_path):
    cfg = load_config(TAGS)
    assert concepts(cfg) == [(name,) for name in CLASS_NAMES]
    path = tmp_path / "names.txt"
    path.write_text("Plain star; asterisk; five-pointed star\n")
    found = dict(zip(CLASS_NAMES, concepts(load_config(TAGS, ["MODEL.DETIC.SYNONYMS", str(path)]))))
    assert found["plain star"] == ("plain star", "asterisk", "five-pointed star") and found["plain moon"] == (
        "plain moon",
    )
    assert concepts(load_config(TAGS, ["MODEL.DETIC.CONCEPTS", "base"])) == [(name,) for name in BASE_NAMES]


def test_an_unknown_word_with_synonyms_is_named(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("plain stair; step\n")
    with pytest.raises(UsageError, match=r"'plain stair' \(did you mean plain star\?\)"):
        concepts(load_config(TAGS, ["MODEL.DETIC.SYNONYMS", str(path)]))


def test_rows_are_found_by_name():
    bank = WordBank(micro.vocabulary())
    assert torch.equal(rows_of(bank, ["Blue_moon", "plain heart"]), bank.embeddings[[1, 4]])
    with pytest.raises(UsageError, match="1 tags are not among the detector's 5 words, first 'car'"):
        rows_of(bank, ["car", "red star"])


def test_labels_of_other_classes_are_refused():
    spec = SourceSpec("labels", ("ov_coco_val_all",), 2, IMAGE_LABELS)  # any data set with a split
    with pytest.raises(UsageError, match=rf"labels of ov_coco_val_all are of {len(OV_COCO.names)} classes"):
        detic_steps(load_config(TAGS), spec)
    (step,) = detic_steps(load_config(TAGS), SourceSpec("captions", ("ov_shapes_captions",), 2, CAPTIONS))
    assert isinstance(step, AttachTexts) and step.cache is None and step.kind is DeticTexts


@pytest.mark.parametrize("overrides, message", [
    (["MODEL.DETIC.TAG_WEIGHT", -1.0], "TAG_WEIGHT is -1.0"),
    (["MODEL.DETIC.TAG_PROPOSALS", 0], "TAG_PROPOSALS 0"),
    (["MODEL.DETIC.CONCEPTS", "novel"], "CONCEPTS is 'novel': choose all or base"),
    (["MODEL.DETIC.QUEUE", -1], "QUEUE is -1"),
    (["MODEL.DETIC.TAG_RULE", "x"], "TAG_RULE is 'x': choose words or published"),
    (["MODEL.DETIC.TAG_CAPTIONS", "x"], "TAG_CAPTIONS is 'x'"),
    (["MODEL.OVD.CLS_LOSS", "softmax"], "losses with a sigmoid for each word"),
    (["MODEL.META_ARCHITECTURE", "FrozenVLMRCNN"], "which is for OpenVocabularyRCNN"),
])  # fmt: skip
def test_settings_without_meaning_are_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        check_methods(load_config(TAGS, overrides))


def declared(config, *overrides):
    return setting_of(load_config(config, list(overrides)), NOVEL_NAMES)


@pytest.mark.parametrize("config, weak, named", [
    ("ovshapes/vild_text_r18.yaml", False, "no"), ("ovshapes/detic_boxes_r18.yaml", False, "no"), (TAGS, True, "yes"),
    ("ovshapes/detic_captions_r18.yaml", True, "unknown"), (BOTH, True, "yes"), ("ovshapes/vldet_r18.yaml", True, "yes"),
    ("ovcoco/detic_r50.yaml", None, "unknown"), ("ovcoco/detic_both_r50.yaml", True, "yes"),
])  # fmt: skip
def test_the_declared_setting(config, weak, named):
    found = declared(config)
    assert found.novel_names == named and "V" in found.letters
    if weak is not None:
        assert ("W" in found.letters) == weak and (found.captions != "none") == weak and found.image_labels == "none"


def test_base_words_as_tags_are_no_novel_names():
    assert declared(TAGS, "MODEL.DETIC.CONCEPTS", "base").novel_names == "unknown"  # the captions may hold them


def part_of(*overrides):
    cfg = micro.cfg()
    cfg.MODEL.OVD.CLS_LOSS = "sigmoid"
    cfg.merge_from_list(["MODEL.DETIC.TAG_WEIGHT", 0.1, "MODEL.DETIC.TAG_PROPOSALS", 8, *overrides])
    network = micro.model(config=cfg)
    network.detic.terms["loss_tags"].table = network.vocabulary.embeddings
    return network


def test_the_part_has_the_terms_of_the_configuration():
    network = part_of("MODEL.DETIC.CAPTION_WEIGHT", 0.2, "MODEL.DETIC.QUEUE", 4, "MODEL.DETIC.OWN_BIAS", True)
    assert network.detic.loss_weights == {"loss_tags": 0.1, "loss_captions": 0.2}
    assert network.detic.samplers["loss_tags"] == MaxSize(8)
    names = {name for name in network.state_dict() if name.startswith("detic.")}
    assert names == {
        "detic.terms.loss_tags.logits.bias", "detic.terms.loss_captions.logits.bias",
        *(f"detic.terms.loss_captions.queue.{name}" for name in ("embeddings", "ids", "place")),
    }  # fmt: skip
    found = losses(network, [*micro.images(1), *captioned(DeticTexts)])
    assert all(found[name] > 0 for name in ("loss_tags", "loss_captions"))


def test_tags_of_an_image_draw_its_region_to_their_words():
    """Small steps of gradient descent lower the loss of the regions of the first step.

    They are fixed: with other weights of the backbone, another proposal is the largest.
    """
    network, samples = part_of(), captioned(DeticTexts, tags=((3,), (4,)))
    sampler, first = network.detic.samplers["loss_tags"], []

    def fixed(proposals, texts):
        first.append(first[0] if first else sampler(proposals, texts))
        return first[0]

    network.detic.samplers["loss_tags"] = fixed
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        value = losses(network, samples)["loss_tags"]
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[0] > values[1] > values[2]
