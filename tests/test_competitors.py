"""Competitors of few words: their share of the probability is theirs, and they are never detected."""

import pytest
import torch
from torch.nn import functional as F

from ovdet2.config import check_methods
from ovdet2.errors import DataError, UsageError
from ovdet2.layers import fuse_scores
from ovdet2.vlm.fingerprint import Fingerprint
from tests import micro

VARIANTS = {
    "text": [],
    "ensemble": ["MODEL.VILD.WEIGHT", 0.5, "MODEL.VILD.OWN_HEAD", True, "MODEL.OVD.SECONDARY_SCORES", "image"],
    "image": [
        *["MODEL.VILD.WEIGHT", 0.5, "MODEL.OVD.CLS_LOSS_WEIGHT", 0.0],
        *["MODEL.OVD.SECONDARY_SCORES", "image", "MODEL.OVD.SECONDARY_USE", "only"],
    ],
}
OTHERS = ("grey cube", "pink cone", "tall tree")


def model(variant, **words):
    config = micro.cfg()
    config.merge_from_list(VARIANTS[variant])
    return micro.model(micro.vocabulary(**words), config)


def others(names=OTHERS, teacher=micro.TEACHER):
    return micro.vocabulary(names, num_base=0, teacher=teacher, frequency=0.9)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_a_float64_softmax_over_all_columns(variant):
    """Scores of 2 words with 3 competitors are those of the 5-word vocabulary, without the columns of the competitors."""
    network, asked = model(variant), micro.vocabulary(("moon", "kite"), num_base=0)
    features, batch = {}, micro.images(1)

    def keep(predictions, proposals):
        features["probs"] = type(predictor).predict_probs(predictor, predictions, proposals)
        return features["probs"]

    predictor = network.roi_heads.box_predictor
    predictor.predict_probs = keep
    network.vocabulary.set(asked, competitors=others())
    found = network(batch)[0]["instances"]
    with_competitors = features["probs"][0]
    network.vocabulary.set(asked.joined(others()))
    whole = network(batch)[0]["instances"]
    assert torch.equal(with_competitors, features["probs"][0]) and with_competitors.shape[1] == 6
    assert len(found) and set(found.pred_classes.tolist()) <= {0, 1} and set(whole.pred_classes.tolist()) > {0, 1}
    expected = torch.sort(features["probs"][0][:, :2].flatten(), descending=True).values
    assert torch.isin(found.scores, expected).all() and found.scores[0] == expected[0]


@torch.no_grad()
def test_one_word_alone_is_everything():
    """The softmax of ViLD's image branch over one word is 1; with competitors it is that of K words in float64."""
    network = model("image")
    embeddings = F.normalize(micro.wave((7, 8), 0.43), dim=1)
    classify = network.roi_heads.classifier.classify_without_background
    network.vocabulary.set(micro.vocabulary(("moon",), num_base=0))
    assert torch.equal(classify(embeddings), torch.ones(7, 1))
    network.vocabulary.set(micro.vocabulary(("moon",), num_base=0), competitors=others())
    columns = torch.cat([micro.vocabulary(("moon",)).embeddings, others().embeddings]).double()
    expected = (embeddings.double() @ columns.T / micro.TEMPERATURE).softmax(1)
    assert torch.allclose(classify(embeddings).double(), expected, atol=1e-6) and expected[:, 0].max() < 0.95


@torch.no_grad()
def test_competitors_only_lower_scores_and_none_changes_nothing():
    network, asked, batch = model("text"), micro.vocabulary(("moon", "kite"), num_base=0), micro.images(2)
    network.vocabulary.set(asked)
    alone = network(batch)
    network.vocabulary.set(asked, competitors=None)
    assert all(
        torch.equal(a["instances"].scores, b["instances"].scores) for a, b in zip(alone, network(batch), strict=True)
    )
    network.vocabulary.set(asked, competitors=others())
    for before, after in zip(alone, network(batch), strict=True):
        assert after["instances"].scores.max() < before["instances"].scores.max()


@torch.no_grad()
def test_the_order_of_competitors_does_not_matter():
    network, asked, batch = model("text"), micro.vocabulary(("moon", "kite"), num_base=0), micro.images(1)
    scores = []
    for rows in ([0, 1, 2], [2, 0, 1]):
        network.vocabulary.set(asked, competitors=others().selected(rows))
        scores.append(network(batch)[0]["instances"].scores)
    assert torch.allclose(*scores, atol=1e-6)


def test_what_the_bank_knows_of_them():
    bank = model("text").vocabulary
    assert bank.num_detectable == len(bank) == 5
    bank.set(micro.vocabulary(("moon",), num_base=0), competitors=others(("red star", "kite")))
    assert bank.num_detectable == 1 and bank.names == ("moon", "red star", "kite")
    assert bank.base_mask.tolist() == [False, True, False]  # "red star" had training boxes
    bank.set(micro.vocabulary(("moon",), num_base=0))
    assert bank.num_detectable == len(bank) == 1
    with pytest.raises(DataError, match="the competitors"):
        bank.set(micro.vocabulary(("moon",)), competitors=others(teacher=Fingerprint("other", "test", "1" * 64)))


@torch.no_grad()
def test_who_competes():
    """A softmax, of the classifier or of secondary scores; not a sigmoid, and not a closed set."""
    config = micro.cfg()
    assert micro.model(config=config).words_compete
    config.MODEL.OVD.CLS_LOSS = "sigmoid"
    assert not micro.model(config=config).words_compete
    config.MODEL.OVD.SECONDARY_SCORES = "image"
    assert micro.model(config=config).words_compete


def test_selected_words():
    words = micro.vocabulary()
    chosen = words.selected([3, 0])
    assert chosen.names == ("dotted star", "red star") and chosen.category_ids == (13, 10)
    assert chosen.base_mask.tolist() == [False, True] and torch.equal(chosen.embeddings, words.embeddings[[3, 0]])


# --- the background of the second branch ---------------------------------------------------------------------------


def fused(background, use="fuse", words=5, **keys):
    config = micro.cfg()
    config.MODEL.OVD.SECONDARY_BACKGROUND, config.MODEL.OVD.SECONDARY_USE = background, use
    config.MODEL.OVD.SECONDARY_SCORES = "image"
    predictor = micro.model(config=config).roi_heads.box_predictor
    from detectron2.structures import Boxes, Instances

    proposals = Instances((64, 96))
    proposals.proposal_boxes = Boxes(torch.tensor([[1.0, 1.0, 20.0, 20.0]] * 4))
    proposals.objectness_logits = torch.tensor([-3.0, 0.0, 1.0, 4.0])
    proposals.secondary_probs = (micro.wave((4, words), 0.5)).softmax(1)
    logits = micro.wave((4, 6), 0.8) * 3
    [probs] = predictor.predict_probs((logits, None), [proposals])
    return probs, logits.double().softmax(1), proposals


@pytest.mark.parametrize("background", ["none", "text", "objectness"])
@pytest.mark.parametrize("use", ["fuse", "only"])
def test_background_of_secondary_scores_equals_float64_reference(background, use):
    """score = p^(1 - e) (s b)^e: s the secondary score, b 1, or 1 - p_background, or the objectness."""
    found, text, proposals = fused(background, use)
    factor = {
        "none": torch.ones(4, 1).double(),
        "text": 1 - text[:, 5:],
        "objectness": 1 / (1 + (-proposals.objectness_logits.double()).exp())[:, None],
    }[background]
    second = proposals.secondary_probs.double() * factor
    exponents = torch.tensor([1 / 3] * 3 + [2 / 3] * 2).double() if use == "fuse" else torch.ones(5).double()
    expected = text[:, :5] ** (1 - exponents) * second**exponents
    assert torch.allclose(found[:, :5].double(), expected, atol=1e-6)
    if background == "none" and use == "fuse":
        assert torch.allclose(found, fuse_scores(text.float(), proposals.secondary_probs, exponents.float()))


def test_settings_of_the_background_that_contradict():
    with pytest.raises(UsageError, match="SECONDARY_BACKGROUND is 'rpn': choose one of none, text, objectness"):
        fused("rpn")
    for scores in ("none", "map"):
        config = micro.cfg()
        config.MODEL.OVD.SECONDARY_BACKGROUND, config.MODEL.OVD.SECONDARY_SCORES = "objectness", scores
        with pytest.raises(UsageError, match="SECONDARY_BACKGROUND is 'objectness', but .*: set it to \"none\""):
            check_methods(config)
    with pytest.raises(UsageError, match='"only_objectness" keeps background low already'):
        fused("text", "only_objectness")
    with pytest.raises(UsageError, match="these secondary scores have a background"):
        fused("objectness", words=6)
    config = micro.cfg()
    config.MODEL.OVD.SECONDARY_BACKGROUND, config.MODEL.OVD.CLS_LOSS = "text", "sigmoid"
    config.MODEL.OVD.SECONDARY_SCORES = "image"
    with pytest.raises(UsageError, match="needs a background class"):
        micro.model(config=config)
