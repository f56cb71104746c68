"""VLDet: settings, nouns and the part of a detector. The equation: tests/test_weak_losses.py."""

import pytest
import torch

from ovdet2.config import check_methods, load_config
from ovdet2.data.steps.texts import AttachTexts
from ovdet2.errors import UsageError
from ovdet2.evaluation.training_setting import setting_of
from ovdet2.methods.vldet.losses import VLDetTexts, nouns
from ovdet2.modeling.weak.samplers import TopK
from ovdet2.ov_shapes.world.classes import CLASS_NAMES, NOVEL_NAMES
from ovdet2.vocabulary.tags import TagMatcher
from tests import micro
from tests.test_rcnn import losses
from tests.weak_cases import captioned

CONFIG = "ovshapes/vldet_r18.yaml"


class Source:
    """With the step of a source."""

    def __init__(self, *names):
        self.steps = [AttachTexts(None, TagMatcher([(name,) for name in names]), kind=VLDetTexts)]


def network():
    cfg = micro.cfg()
    cfg.MODEL.OVD.CLS_LOSS = "sigmoid"
    cfg.merge_from_list(
        ["MODEL.VLDET.NOUN_WEIGHT", 0.01, "MODEL.VLDET.CAPTION_WEIGHT", 0.1, "MODEL.VLDET.PROPOSALS", 6]
    )
    return micro.model(config=cfg)


def test_nouns_are_the_words_of_the_data_set_or_a_list(tmp_path):
    assert nouns(load_config(CONFIG)) == [(name,) for name in CLASS_NAMES]
    path = tmp_path / "nouns.txt"
    path.write_text("ring; loop\nsquare\n")
    cfg = load_config(CONFIG, ["MODEL.VLDET.NOUNS", str(path)])
    assert nouns(cfg) == [("ring", "loop"), ("square",)] and setting_of(cfg, NOVEL_NAMES).novel_names == "unknown"
    path.write_text("Plain_moon\nsquare\n")
    assert setting_of(cfg, NOVEL_NAMES).novel_names == "yes"


def test_the_part():
    detector, samples = network(), captioned(VLDetTexts)
    assert detector.vldet.samplers["loss_nouns"] == TopK(6) and detector.vldet.training_only
    detector.vldet.terms["loss_nouns"].table = detector.vocabulary.embeddings
    found = losses(detector, [*micro.images(1), *samples])
    assert found["loss_nouns"] > 0 and found["loss_noun_captions"] > 0
    sum(found.values()).backward()


def test_the_table_is_embedded_before_the_first_step(monkeypatch):
    detector, rows = network(), torch.eye(8)[:2]
    detector.vldet.name, asked = "vldet", []
    detector.vldet._embed = lambda names: asked.append(names) or rows
    detector.vldet.prepare_training([Source("ring", "square")])
    assert asked == [["ring", "square"]] and torch.equal(detector.vldet.terms["loss_nouns"].table, rows)
    with pytest.raises(UsageError, match="sources of vldet have 2 lists of concepts"):
        detector.vldet.prepare_training([Source("ring"), Source("square")])


@pytest.mark.parametrize("overrides, message", [
    (["MODEL.VLDET.NOUN_WEIGHT", -1.0], "NOUN_WEIGHT is -1.0"), (["MODEL.VLDET.PROPOSALS", 0], "PROPOSALS 0"),
    (["MODEL.VLDET.NOUN_WEIGHT", 0.0], "for captions only, use MODEL.DETIC.CAPTION_WEIGHT"),
    (["MODEL.OVD.CLS_LOSS", "softmax"], "MODEL.VLDET has losses with a sigmoid"),
])  # fmt: skip
def test_settings_without_meaning_are_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        check_methods(load_config(CONFIG, overrides))
