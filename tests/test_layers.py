"""Score fusion, text classifier, class-wise NMS, vocabulary buffer: independent references and properties."""

import numpy as np
import pytest
import torch
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.errors import DataError, UsageError
from ovdet2.layers import ClosedSetClassifier, TextClassifier, class_wise_nms, fuse_scores, fusion_exponents
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary.bank import WordBank
from tests import micro


def reference_logits(features, classifier, rows):
    """float64 numpy: cosine of the projected region to each row and to the background, over tau."""
    weight, bias = (
        classifier.projection.weight.detach().double().numpy(),
        classifier.projection.bias.detach().double().numpy(),
    )
    region = features.double().numpy() @ weight.T + bias
    columns = np.concatenate([rows.double().numpy(), classifier.background.detach().double().numpy()[None]])
    out = np.empty((len(region), len(columns)))
    for i, e in enumerate(region):
        for j, t in enumerate(columns):
            out[i, j] = e @ t / (np.sqrt(e @ e) * np.sqrt(t @ t)) / 0.01
    return out


def classifier(words=None):
    layer = TextClassifier(12, WordBank(words or micro.vocabulary()))
    with torch.no_grad():
        layer.projection.weight.copy_(micro.wave((8, 12)))
        layer.background.copy_(micro.wave((8,), 0.9))
    return layer


def test_text_classifier_equals_float64_reference():
    layer, features = classifier(), micro.wave((7, 12), 0.31)
    words = micro.vocabulary()
    assert np.allclose(layer.eval()(features).detach(), reference_logits(features, layer, words.embeddings), atol=2e-4)
    assert np.allclose(
        layer.train()(features).detach(), reference_logits(features, layer, words.embeddings[:3]), atol=2e-4
    )


def test_novel_columns_do_not_exist_in_training():
    layer = classifier().train()
    features = micro.wave((4, 12), 0.31)
    before = layer(features)
    assert before.shape == (4, 4)  # 3 base + background
    changed = micro.vocabulary()
    changed.embeddings[3:] = -changed.embeddings[3:]
    layer.vocabulary.set(changed)
    assert torch.equal(before, layer(features))


def test_permuting_words_permutes_logits_and_k_is_free():
    words, order = micro.vocabulary(num_base=0), torch.tensor([4, 2, 0, 3, 1])
    features = micro.wave((6, 12), 0.31)
    layer = classifier(words).eval()
    straight = layer(features)
    permuted = micro.Vocabulary(
        [words.names[i] for i in order], words.base_mask[order], words.embeddings[order], words.teacher, "single"
    )
    layer.vocabulary.set(permuted)
    assert torch.allclose(layer(features)[:, :-1], straight[:, order], atol=1e-5)
    layer.vocabulary.set(words.select(torch.tensor([False, True, False, False, False])))  # K = 1
    assert torch.allclose(layer(features), straight[:, [1, 5]], atol=1e-5)
    assert layer(features[:0]).shape == (0, 2)


def test_logits_are_float32_under_autocast():
    layer, features = classifier().eval(), micro.wave((3, 12), 0.31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(features)
    assert logits.dtype == torch.float32


def test_closed_set_head_refuses_other_words():
    buffer = WordBank(micro.vocabulary())
    layer = ClosedSetClassifier(12, buffer)
    assert layer.num_training_classes == 5 and layer(torch.zeros(2, 12)).shape == (2, 6)
    buffer.set(micro.vocabulary(("cat",), 0))
    with pytest.raises(UsageError, match="closed-set head of 5"):
        layer(torch.zeros(2, 12))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 10_000))
def test_fusion_equals_reference(r, k, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(r, k + 1, generator=generator).softmax(1)
    second = torch.rand(r, k, generator=generator).softmax(1)
    fused = fuse_scores(first, second, torch.full((k,), exponent))
    expected = first.double().clone()
    for i in range(r):
        for j in range(k):
            expected[i, j] = float(first[i, j]) ** (1 - exponent) * float(second[i, j]) ** exponent
    assert torch.allclose(fused.double(), expected, atol=1e-6)
    renormalised = fuse_scores(first, second, exponent, renormalize=True)
    assert torch.allclose(renormalised.sum(1), torch.ones(r), atol=1e-5)


def test_fusion_ends_and_zero_probability():
    first = torch.tensor([[0.0, 0.7, 0.3]])
    second = torch.tensor([[0.5, 0.0]])
    assert torch.equal(fuse_scores(first, second, 0.0), first)
    assert torch.equal(fuse_scores(first, second, 1.0)[:, :2], second)
    assert torch.equal(fuse_scores(first, second, 1 / 3)[:, :2], torch.zeros(1, 2))
    assert fusion_exponents(torch.tensor([True, False]), 1 / 3, 2 / 3).tolist() == pytest.approx([1 / 3, 2 / 3])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.integers(1, 15), st.integers(0, 10_000))
def test_class_wise_nms_equals_detectron2_over_all_pairs(r, k, topk, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(r, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(r, 2, generator=generator) * 30], 1)
    scores = torch.rand(r, k + 1, generator=generator)
    expected, _ = fast_rcnn_inference_single_image(boxes, scores, (100, 100), 0.1, 0.5, topk)
    regions, classes = class_wise_nms(boxes, scores[:, :-1], 0.1, 0.5, topk)
    assert torch.equal(scores[regions, classes], expected.scores)
    assert torch.equal(classes, expected.pred_classes)
    assert torch.equal(boxes[regions], expected.pred_boxes.tensor)


def test_class_wise_nms_grows_until_enough_survive():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(500, 1)  # one survivor per class
    scores = torch.linspace(0.5, 1, 500)[:, None] * torch.tensor([[1.0, 1e-3, 1e-4]])
    regions, classes = class_wise_nms(boxes, scores, 0.0, 0.5, 3)
    assert regions.tolist() == [499, 499, 499] and classes.tolist() == [0, 1, 2]


def test_buffer_moves_with_the_model_and_refuses_another_space():
    buffer = WordBank(micro.vocabulary())
    assert set(buffer.state_dict()) == {"embeddings", "base_mask", "manifest"}
    with pytest.raises(DataError, match="micro / other"):
        buffer.set(micro.vocabulary(teacher=Fingerprint("micro", "other", "1" * 64)))
    with pytest.raises(DataError, match="6 dimensions, the model 8"):
        buffer.set(micro.vocabulary(dim=6))


def test_saved_vocabulary_of_another_k_is_fine_of_another_teacher_is_not():
    saved = WordBank(micro.vocabulary()).state_dict()
    buffer = WordBank(micro.vocabulary(("cat", "dog"), 0))
    buffer.adopt_saved_vocabulary(saved)
    assert buffer.words.names == ("cat", "dog")
    assert buffer.trained_base_names == set(micro.NAMES[:3])
    other = WordBank(micro.vocabulary(teacher=Fingerprint("micro", "other", "1" * 64))).state_dict()
    with pytest.raises(DataError, match="the checkpoint is of teacher micro / other"):
        buffer.adopt_saved_vocabulary(other)
    with pytest.raises(DataError, match="trained with embeddings of 6 dimensions, that of this run has 8"):
        buffer.adopt_saved_vocabulary(WordBank(micro.vocabulary(dim=6)).state_dict())
    with pytest.raises(DataError, match="cannot be read"):
        buffer.adopt_saved_vocabulary({"embeddings": saved["embeddings"]})


def test_training_refuses_words_out_of_order():
    words = micro.vocabulary()
    shuffled = words.select(torch.ones(5, dtype=torch.bool))
    shuffled.base_mask[:] = torch.tensor([False, True, True, True, False])
    with pytest.raises(UsageError, match="base words first"):
        WordBank(shuffled).training_embeddings
