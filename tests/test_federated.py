"""One decision per word: the sigmoid loss, its federated form, and the classifier that goes with it."""

import math

import pytest
import torch
from detectron2.data import MetadataCatalog
from torch.nn import functional as F

from ovdet2.config import load_config
from ovdet2.errors import UsageError
from ovdet2.layers import CosineClassifier
from ovdet2.layers.cosine_classifier import RARE_BIAS
from ovdet2.modeling.losses import federated_words, sigmoid_classification
from ovdet2.vocabulary.bank import WordBank
from tests import micro


def reference(logits, labels, words):
    """The definition, number by number."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist()):
        for word, value in enumerate(row):
            probability = 1.0 / (1.0 + math.exp(-value))
            if words[word]:
                total -= math.log(probability if word == label else 1.0 - probability)
    return total / len(labels) if len(labels) else 0.0


@pytest.mark.parametrize("regions, classes", [(7, 5), (1, 1), (3, 1), (0, 4)])
def test_loss_against_the_definition(regions, classes):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(regions, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes + 1, (regions,), generator=generator)
    some = torch.rand(classes, generator=generator) < 0.5
    for words, mask in ((None, [True] * classes), (some, some.tolist())):
        assert sigmoid_classification(logits, labels, words).item() == pytest.approx(
            reference(logits, labels, mask), rel=1e-12
        )


def test_loss_does_not_depend_on_the_order_of_words_or_regions():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 6, generator=generator), torch.randint(0, 7, (9,), generator=generator)
    words, order, rows = torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.randperm(6), torch.randperm(9)
    moved = torch.full_like(labels, 6)
    for new, old in enumerate(order.tolist()):
        moved[labels == old] = new
    expected = sigmoid_classification(logits, labels, words)
    found = sigmoid_classification(logits[rows][:, order], moved[rows], words[order])
    assert torch.allclose(found, expected, atol=1e-6)


def test_words_left_out_get_no_gradient_and_half_precision_is_raised():
    logits = torch.randn(4, 3).half().requires_grad_()
    loss = sigmoid_classification(logits, torch.tensor([0, 3, 3, 2]), torch.tensor([True, False, True]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert (logits.grad[:, 1] == 0).all() and (logits.grad[:, [0, 2]] != 0).all()


def test_drawn_words_hold_those_of_the_batch():
    weights = torch.tensor([0.0, 5.0, 1.0, 1.0, 0.0, 2.0])
    labels = torch.tensor([0, 6, 3])
    for _ in range(20):
        words = federated_words(labels, weights, 4)
        assert words[[0, 3]].all() and words.sum() == 4 and not words[4]  # a word of weight 0 only if annotated
    assert federated_words(labels, weights, 2).tolist() == [True, False, False, True, False, False]
    assert federated_words(labels, weights, 1).sum() == 2
    assert federated_words(labels, weights, 50).sum() == 5
    assert federated_words(labels[:0], weights, 3).sum() == 3
    assert federated_words(labels[:0], torch.ones(1), 50).tolist() == [True]


def test_draw_follows_the_weights():
    torch.manual_seed(0)
    weights, labels = torch.tensor([8.0, 4.0, 2.0, 1.0]), torch.tensor([4])
    share = torch.stack([federated_words(labels, weights, 1) for _ in range(4000)]).float().mean(dim=0)
    assert torch.allclose(share, weights / 15, atol=0.03)


def test_classifier_per_word_is_cosine_over_tau_plus_bias():
    words = micro.vocabulary()
    classifier = CosineClassifier(6, WordBank(words), temperature=0.1, bias=RARE_BIAS, background="zero").eval()
    features = torch.randn(3, 6)
    weight, bias = classifier.projection.weight.double(), classifier.projection.bias.double()
    embeddings = F.normalize(features.double() @ weight.T + bias, dim=1)
    expected = embeddings @ words.embeddings.double().T / 0.1 + math.log(0.01 / 0.99)
    found = classifier(features)
    assert found.shape == (3, 6) and (found[:, -1] == 0).all()
    assert torch.allclose(found[:, :-1].double(), expected, atol=1e-5)
    assert classifier.train()(features).shape == (3, 4)
    assert "background" not in classifier.state_dict()


def config(**changes):
    result = micro.cfg()
    result.MODEL.OVD.CLS_LOSS = "sigmoid"
    result.DATASETS.TRAIN = ("test_counted",)
    for key, value in changes.items():
        result.MODEL.OVD[key] = value
    return result


@pytest.fixture
def counted():
    """A training set whose image counts are known: three base words and two novel ones."""
    metadata = MetadataCatalog.get("test_counted")
    metadata.ov_image_counts = [9, 1, 4, 7, 7]
    yield
    MetadataCatalog.pop("test_counted")


def federated_model(**changes):
    return micro.model(config=config(**changes))


def test_detector_trains_and_detects_word_by_word(counted):
    network = federated_model(FEDERATED_WORDS=2, FEDERATED_POWER=0.5)
    predictor = network.roi_heads.box_predictor
    assert predictor.federated_weights.tolist() == [3.0, 1.0, 2.0]
    assert not any("federated" in name for name in network.state_dict())
    with torch.no_grad():
        (found,) = network(micro.images(1))
        scores = found["instances"].scores
    assert len(scores) and (scores > 0).all() and (scores < 1).all()
    from detectron2.utils.events import EventStorage

    with EventStorage():
        losses = network.train()(micro.images(2))
        losses["loss_cls"].backward()
    assert torch.isfinite(losses["loss_cls"]) and predictor.cls_score.bias.grad != 0


def test_batch_loss_is_that_of_the_drawn_words(counted, monkeypatch):
    from detectron2.utils.events import EventStorage

    network = federated_model(FEDERATED_WORDS=2)
    seen = {}

    def spy(logits, labels, words):
        seen.update(labels=labels, words=words, loss=sigmoid_classification(logits, labels, words))
        return seen["loss"]

    monkeypatch.setattr("ovdet2.modeling.rcnn.output_layers.sigmoid_classification", spy)
    with EventStorage():
        losses = network.train()(micro.images(1))
    assert losses["loss_cls"] == seen["loss"]
    assert len(seen["words"]) == 3  # base words alone: a novel name is never a negative
    assert seen["words"][seen["labels"][seen["labels"] < 3].unique()].all()


def test_training_without_counts_says_so():
    from detectron2.utils.events import EventStorage

    network = federated_model(FEDERATED_WORDS=2)
    with EventStorage(), pytest.raises(UsageError, match="needs the class counts of DATASETS.TRAIN"):
        network.train()(micro.images(1))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"CLS_LOSS": "focal"}, "softmax"),
        ({"CLS_LOSS": "softmax", "FEDERATED_WORDS": 5}, "FEDERATED_WORDS is 5"),
        ({"FEDERATED_WORDS": -1}, "FEDERATED_WORDS is -1"),
        ({"CLASSIFIER": "closed_set"}, 'requires MODEL.OVD.CLASSIFIER "text"'),
    ],
)
def test_switches_that_do_not_go_together(changes, named):
    with pytest.raises(UsageError, match=named):
        federated_model(**changes)


def test_words_of_detic():
    """Detic's 50 indices per batch include that of the background, which has no loss."""
    ovd = load_config("ovlvis/federated_text_r50.yaml").MODEL.OVD
    assert (ovd.CLS_LOSS, ovd.FEDERATED_WORDS, ovd.FEDERATED_POWER, ovd.TEMPERATURE) == ("sigmoid", 50 - 1, 0.5, 1 / 50)
