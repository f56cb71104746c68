"""Negative words, which absorb detections, and words with several names, whose score is the maximum."""

import math
from dataclasses import replace

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from ovdet2.errors import DataError, UsageError
from ovdet2.layers import CosineClassifier
from ovdet2.modeling.build import build_classifier, words_to_vocabulary
from ovdet2.modeling.detr.postprocess import PostProcessor
from ovdet2.modeling.rcnn.output_layers import OpenVocabularyOutputLayers
from ovdet2.predictor import Detector, above
from ovdet2.programs.predict import thresholds_of
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank
from tests import detr_cases, micro
from tests.vocabulary_cases import HashTeacher, text_row

ASKED, NEGATIVE = ("moon", "kite"), ("grey cube", "pink cone", "tall tree")


def words(names=ASKED, **options):
    return micro.vocabulary(names, num_base=0, **options)


def negative(names=NEGATIVE):
    return words(names, frequency=0.9)


@pytest.fixture(scope="module")
def network():
    return micro.model()


@torch.no_grad()
def test_with_a_softmax_they_take_part_in_it(network, monkeypatch):
    """Scores are those of a softmax over all words and the background, without the columns of negative words."""
    batch = micro.images(1)
    network.vocabulary.set(words().joined(negative()))
    kept = network.roi_heads.box_predictor
    probs = []
    original = type(kept).predict_probs
    monkeypatch.setattr(kept, "predict_probs", lambda *given: probs.append(original(kept, *given)) or probs[-1])
    network(batch)
    network.vocabulary.set(words(), negative=negative())
    found = network(batch)[0]["instances"]
    assert torch.equal(probs[0][0], probs[1][0]) and network.vocabulary.num_negative == 3
    assert len(found) and set(found.pred_classes.tolist()) <= {0, 1}
    assert found.scores[0] == probs[0][0][:, :2].max()
    network.vocabulary.set(words())
    assert network(batch)[0]["instances"].scores.max() > found.scores.max() and network.vocabulary.num_negative == 0


@torch.no_grad()
def test_with_sigmoids_a_box_on_a_negative_word_is_dropped():
    """Independent statement over all boxes; competitors after the negative words drop nothing."""
    config = micro.cfg()
    config.MODEL.OVD.CLS_LOSS = "sigmoid"
    bank = WordBank(micro.vocabulary())
    predictor = OpenVocabularyOutputLayers(config, ShapeSpec(channels=6), build_classifier(config, 6, bank))
    bank.set(words(), negative=negative(), competitors=words(("far",), frequency=0.3))
    probs = micro.wave((30, 7), 0.37).abs()
    probs[0] = torch.tensor([0.5, 0.1, 0.5, 0.2, 0.1, 0.9, 0.0])  # a tie with a negative word; the competitor is higher
    predictor.test_nms_thresh, predictor.test_topk_per_image, predictor.test_score_thresh = 1.1, 1000, 0.0
    boxes = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) * 20
    boxes[:, 2:] += boxes[:, :2] + 5
    [found], [regions] = predictor.select([boxes], [probs], [(64, 64)])
    expected = {
        (row, word)
        for row, scores in enumerate(probs.double().tolist())
        for word in range(2)
        if max(scores[:2]) >= max(scores[2:5]) and scores[word] > 0
    }
    assert set(zip(regions.tolist(), found.pred_classes.tolist())) == expected
    assert 2 < len(expected) < 60 and {(0, 0), (0, 1)} <= expected


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 50])
def test_queries_of_a_detr_on_negative_words_are_dropped(count):
    bank = WordBank(micro.vocabulary())
    bank.set(words(), negative=negative())
    outputs = detr_cases.outputs(2, 2, 9, 5)
    sizes = [(50, 80), (64, 33)]
    found = PostProcessor(count)(outputs, sizes, vocabulary=bank)
    for image in range(2):
        logits = outputs.pred_logits[1, image].double().tolist()
        expected = sorted(
            (
                (1 / (1 + math.exp(-row[word])), query, word)
                for query, row in enumerate(logits)
                for word in range(2)
                if max(row[:2]) >= max(row[2:])
            ),
            reverse=True,
        )
        assert 0 < len(expected) < 18
        expected = expected[:count]
        pairs = zip(found[image].queries.tolist(), found[image].pred_classes.tolist())
        assert list(pairs) == [(query, word) for _, query, word in expected]
        assert found[image].scores.tolist() == pytest.approx([score for score, *_ in expected], abs=1e-6)
    bank.set(words().joined(negative()))
    plain = PostProcessor(count)(outputs, sizes)
    for one, other in zip(PostProcessor(count)(outputs, sizes, vocabulary=bank), plain, strict=True):
        assert torch.equal(one.scores, other.scores)


def test_the_order_of_the_bank_and_another_teacher():
    bank = WordBank(micro.vocabulary())
    bank.set(words(), negative=negative(), competitors=words(("far",)))
    assert bank.names == (*ASKED, *NEGATIVE, "far") and (bank.num_detectable, bank.num_negative) == (2, 3)
    other = Fingerprint("other", "test", "1" * 64)
    with pytest.raises(DataError, match="the negative words"):
        bank.set(words(), negative=words(NEGATIVE, teacher=other))


# --- several names of a word ---------------------------------------------------------------------------------------

GROUPS = {"moon": ["crescent", "half moon"], "kite": [], "cup": ["mug"]}


def built(pooling):
    return Vocabulary.build(list(GROUPS), HashTeacher(), "single", synonyms=GROUPS.values(), pooling=pooling)


@torch.no_grad()
def test_the_logit_of_a_word_is_the_maximum_over_its_names():
    """In float64, for a softmax with a background and for sigmoids; the mean is the default and unchanged."""
    from ovdet2.vocabulary.templates import render

    mean, most = built("mean"), built("max")
    assert (mean.pooling, most.pooling, words().pooling) == ("mean", "max", None)
    assert torch.equal(mean.embeddings, most.embeddings) and mean.synonyms == most.synonyms
    bank = WordBank(most)
    classifier = CosineClassifier(6, bank, temperature=0.2, background="learned").eval()
    with torch.no_grad():
        classifier.projection.weight.copy_(micro.wave(classifier.projection.weight.shape, 0.3))
    features = micro.wave((4, 6), 0.7)
    logits = classifier(features).double()
    embeddings = classifier.embed(features).double()
    rows = {
        word: torch.tensor([text_row(render(name, "single")[0]).tolist() for name in (word, *others)])
        for word, others in GROUPS.items()
    }
    expected = torch.stack([(embeddings @ of_word.double().T / 0.2).max(1).values for of_word in rows.values()], dim=1)
    assert logits.shape == (4, 4) and torch.allclose(logits[:, :3], expected, atol=1e-5)
    without = classifier.classify_without_background(classifier.embed(features)).double()
    assert torch.allclose(without, expected.softmax(1), atol=1e-5)
    bank.set(mean)
    cosines = embeddings @ mean.embeddings.double().T / 0.2
    assert torch.allclose(classifier(features).double()[:, :3], cosines, atol=1e-5)
    assert not torch.allclose(cosines, expected, atol=0.1)


def test_names_stay_with_their_words(tmp_path):
    most = built("max")
    chosen = most.selected([2, 0])
    rows, word = chosen.name_rows()
    assert word.tolist() == [0, 0, 1, 1, 1] and torch.equal(rows, most.name_embeddings[[4, 5, 0, 1, 2]])
    joined = most.joined(built("mean").selected([1]).pooled("mean").__class__.build(["tree"], HashTeacher(), "single"))
    assert joined.name_rows()[1].tolist() == [0, 0, 0, 1, 2, 2, 3] and joined.pooling == "max"
    most.save(tmp_path / "v.safetensors")
    read = Vocabulary.load(tmp_path / "v.safetensors")
    assert read.pooling == "max" and torch.equal(read.name_embeddings, most.name_embeddings)
    assert read.pooled("mean").pooling == "mean" and read.pooled("max") is read
    assert set(WordBank(read).state_dict()) == {"embeddings", "base_mask", "manifest"}
    with pytest.raises(UsageError, match="holds the mean over the names"):
        built("mean").pooled("max")
    with pytest.raises(UsageError, match="joined by 'median': choose one of mean, max"):
        built("median")
    with pytest.raises(DataError, match="do not belong to the 3 words"):
        replace(most, name_words=torch.tensor([0, 0, 0, 2, 2, 2]))
    assert Vocabulary.build(["a", "b"], HashTeacher(), "single", pooling="max").pooling is None


def test_words_for_a_detector(monkeypatch):
    monkeypatch.setattr("ovdet2.modeling.build.build_teacher", lambda cfg: HashTeacher())
    config = micro.cfg()
    assert words_to_vocabulary(config, "moon; crescent, kite").pooling == "mean"
    assert words_to_vocabulary(config, {"moon": ["crescent"]}, pooling="max").pooling == "max"


# --- the detector --------------------------------------------------------------------------------------------------


@pytest.fixture
def detector(monkeypatch, network):
    """A Detector around the micro model, whose teacher embeds any text."""
    monkeypatch.setattr("ovdet2.modeling.build.build_teacher", lambda cfg: Narrow())
    made = object.__new__(Detector)
    made.cfg, made.model, made.competitors = micro.cfg(), network, "auto"
    made._known_words, made._trained = micro.vocabulary(), None
    return made


class Narrow(HashTeacher):
    """Eight dimensions, as the micro model has."""

    def encode_text(self, texts):
        return F.normalize(super().encode_text(texts)[:, :8], dim=1)


def test_negative_words_of_a_detector(detector):
    detector.set_vocabulary("moon, kite", negative_words="red star, tall tree")
    bank = detector.model.vocabulary
    assert detector.names == ("moon", "kite") and bank.names[:4] == ("moon", "kite", "red star", "tall tree")
    assert bank.names[4:] == ("blue moon", "striped ring")  # the base word "red star" does not compete as well
    detector.set_vocabulary("moon, kite", competitors="off", negative_words={"tree": ["tall tree"]}, pooling="max")
    assert bank.names == ("moon", "kite", "tree") and bank.name_words.tolist() == [0, 1, 2, 2]
    with pytest.raises(UsageError, match="'crescent' is a word to detect and a negative word"):
        detector.set_vocabulary("moon; crescent", negative_words="Crescent")


def test_thresholds_of_a_detector(detector, capsys):
    vocabulary = replace(words(), thresholds=(0.5, None))
    detector.set_vocabulary(vocabulary)
    assert detector.thresholds.isnan().tolist() == [False, True] and detector.thresholds[0] == 0.5
    assert thresholds_of(detector, None).tolist() == [0.5, 0.3] and thresholds_of(detector, 0.1) == 0.1
    assert "thresholds of the vocabulary: 1 of 2 words, else 0.3" in capsys.readouterr().out
    found = Instances((9, 9), pred_boxes=Boxes(torch.zeros(4, 4)), scores=torch.tensor([0.9, 0.5, 0.4, 0.1]))
    found.pred_classes = torch.tensor([0, 0, 1, 1])
    assert above(detector.thresholds, found).scores.tolist() == pytest.approx([0.9, 0.4, 0.1])
    assert len(above(0.45, found)) == 2 and above(None, found) is found
    detector.set_vocabulary(words())
    assert detector.thresholds is None and thresholds_of(detector, None) == 0.3
