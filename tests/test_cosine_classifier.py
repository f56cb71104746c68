"""The cosine classifier in every configuration: an independent reference in float64, and properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.errors import UsageError
from ovdet2.layers import CosineClassifier, column_probabilities, cosine_logits
from ovdet2.modeling.build import build_classifier
from ovdet2.modeling.detr.heads import TextBranch
from ovdet2.vocabulary.bank import WordBank
from tests import micro

C, D, TAU = 12, 8, 0.07
BACKGROUND = torch.nn.functional.normalize(micro.wave((D,), 0.4), dim=0)
KINDS = ("softmax", "sigmoid", "text_background", "detr")


def build(kind, words=None):
    """A classifier as the hosts build it, with weights that do not depend on a random generator."""
    config = micro.cfg()
    config.MODEL.OVD.TEMPERATURE = TAU
    config.MODEL.OVD.CLASSIFIER = "text_background" if kind == "text_background" else "text"
    config.MODEL.OVD.CLS_LOSS = "sigmoid" if kind == "sigmoid" else "softmax"
    bank = WordBank(words or micro.vocabulary(), BACKGROUND if kind == "text_background" else None)
    layer = TextBranch(C, bank, 1 / TAU) if kind == "detr" else build_classifier(config, C, bank)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(micro.wave(tuple(parameter.shape), 0.9 + 0.1 * number))
        if kind == "detr":
            layer.log_scale.fill_(2.5)
    return layer.eval()


def array(tensor):
    return tensor.detach().double().numpy()


def reference(kind, layer, features, rows):
    """float64 numpy: each classifier's equation, as its paper has it."""
    values = {name: array(parameter) for name, parameter in layer.named_parameters()}
    regions = array(features) @ values["projection.weight"].T + values.get("projection.bias", 0)
    columns = array(rows)
    if kind == "softmax":
        columns = np.concatenate([columns, values["background"][None]])
    if kind == "text_background":
        columns = np.concatenate([columns, array(BACKGROUND)[None]])
    cosines = np.array([[e @ t / math.sqrt((e @ e) * (t @ t)) for t in columns] for e in regions])
    if kind == "softmax":
        return cosines / TAU
    if kind == "text_background":
        return cosines / (TAU * math.exp(values["log_scale"]))
    if kind == "detr":
        return cosines * math.exp(values["log_scale"]) + values["bias"]
    return np.concatenate([cosines / TAU + values["bias"], np.zeros((len(cosines), 1))], axis=1)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryConfiguration:
    def test_equals_its_equation_in_float64(self, kind):
        layer, features, words = build(kind), micro.wave((7, C), 0.31), micro.vocabulary()
        for train, rows in ((False, words.embeddings), (True, words.embeddings[:3])):
            expected = reference(kind, layer, features, rows)
            assert layer.train(train)(features).shape == expected.shape
            np.testing.assert_allclose(array(layer(features)), expected, atol=2e-4)

    def test_permuting_words_permutes_logits_and_k_is_free(self, kind):
        words, order, features = micro.vocabulary(num_base=0), [4, 2, 0, 3, 1], micro.wave((6, C), 0.31)
        layer = build(kind, words)
        straight = layer(features)
        rest = list(range(5, straight.shape[1]))
        permuted = micro.Vocabulary(
            [words.names[i] for i in order], words.base_mask[order], words.embeddings[order], words.teacher, "single"
        )
        layer.vocabulary.set(permuted)
        assert torch.allclose(layer(features), straight[:, order + rest], atol=1e-5)
        layer.vocabulary.set(words.select(torch.tensor([False, True, False, False, False])))  # K = 1
        assert torch.allclose(layer(features), straight[:, [1, *rest]], atol=1e-5)
        assert layer(features[:0]).shape == (0, 1 + len(rest))

    def test_a_batch_equals_its_singles_and_maps_their_flattened_values(self, kind):
        layer, features = build(kind), micro.wave((4, C), 0.31)
        singles = torch.cat([layer(row[None]) for row in features])
        assert torch.allclose(layer(features), singles, atol=1e-5)
        assert torch.equal(layer(features.reshape(4, 3, 2, 2)), layer(features))
        assert torch.equal(layer(features.reshape(2, 2, C)), layer(features).reshape(2, 2, -1))
        assert layer(features[:0].reshape(0, 4, C)).shape[:2] == (0, 4)

    def test_novel_columns_do_not_exist_in_training(self, kind):
        layer, features = build(kind).train(), micro.wave((4, C), 0.31)
        before = layer(features)
        assert before.shape[1] == 3 + (kind != "detr") and layer.num_training_classes == 3
        changed = micro.vocabulary()
        changed.embeddings[3:] = -changed.embeddings[3:]
        layer.vocabulary.set(changed)
        assert torch.equal(before, layer(features))

    def test_logits_are_computed_in_float32_under_autocast(self, kind):
        layer, features = build(kind), micro.wave((3, C), 0.31)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, embeddings = layer(features), layer.embed(features)
        assert logits.dtype == embeddings.dtype == torch.float32
        full = layer(features)
        assert torch.allclose(logits, full, atol=0.5) and not torch.equal(logits.bfloat16().float(), logits)

    def test_probabilities_of_the_words_are_those_without_background(self, kind):
        layer, features = build(kind), micro.wave((5, C), 0.31)
        bias = layer.bias if layer.bias is not None else 0  # which a softmax does not see
        found = layer.classify_without_background(layer.embed(features))
        assert torch.allclose(found, (layer(features)[:, :5] - bias).softmax(1), atol=1e-6)

    def test_names_of_weights_and_first_values(self, kind):
        bank = WordBank(micro.vocabulary(), BACKGROUND if kind == "text_background" else None)
        parameters = dict(build(kind).named_parameters())
        own = {"softmax": "background", "sigmoid": "bias", "text_background": "log_scale", "detr": "log_scale bias"}
        projection = ["projection.weight", *(["projection.bias"] if kind != "text_background" else [])]
        assert list(parameters) == [*own[kind].split(), *projection]
        assert parameters["projection.weight"].shape == (D, C)
        saved = [name for name in build(kind).state_dict() if name.startswith("vocabulary.")]
        assert len(saved) == {"detr": 0, "text_background": 4}.get(kind, 3)
        arguments = {
            "softmax": {"temperature": TAU, "background": "learned"},
            "sigmoid": {"temperature": TAU, "background": "zero", "bias": -math.log(99)},
            "text_background": {
                "temperature": TAU, "background": "text", "learns_temperature": True, "projection_bias": False,
            },
            "detr": {"scale": 1 / TAU, "bias": -math.log(99), "owns_bank": False},
        }  # fmt: skip
        torch.manual_seed(5)
        fresh = CosineClassifier(C, bank, **arguments[kind])
        torch.manual_seed(5)  # the same draws in the same order: a linear layer's own, its normal ones, the background
        linear = torch.nn.Linear(C, D, kind != "text_background")
        assert torch.equal(fresh.projection.weight, torch.nn.init.normal_(linear.weight, std=0.01))
        if kind == "softmax":
            assert torch.equal(fresh.background, torch.nn.init.normal_(torch.empty(D), std=0.01))
        if kind in ("sigmoid", "detr"):
            assert fresh.bias.sigmoid().item() == pytest.approx(0.01)
        if kind in ("text_background", "detr"):
            assert fresh.log_scale.item() == pytest.approx(math.log(1 / TAU) if kind == "detr" else 0.0)


def test_a_learned_scale_stays_at_or_below_100():
    layer, features = build("detr"), micro.wave((4, C), 0.31)
    with torch.no_grad():
        layer.log_scale.fill_(50.0)
    cosines = torch.nn.functional.normalize(layer.projection(features), dim=1) @ micro.vocabulary().embeddings.T
    assert torch.allclose(layer(features), 100 * cosines + layer.bias, atol=1e-3)
    layer(features).sum().backward()
    assert layer.log_scale.grad.abs() > 0  # a cap on the value alone would leave it without a gradient


def test_settings_that_do_not_go_together():
    bank = WordBank(micro.vocabulary())
    for scale in (0, -1.0, 100.5):
        with pytest.raises(UsageError, match=r"choose one in \(0, 100\]"):
            CosineClassifier(C, bank, scale=scale)
    with pytest.raises(UsageError, match="give WordBank a background"):
        CosineClassifier(C, bank, temperature=TAU, background="text")
    for settings_ in ({}, {"temperature": 0.1, "scale": 3.0}, {"scale": 3.0, "learns_temperature": True}):
        with pytest.raises(ValueError, match="either a temperature"):
            CosineClassifier(C, bank, **settings_)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.floats(0.01, 2), st.floats(-3, 3), st.integers(0, 10_000))
def test_function_equals_its_equation(regions, count, tau, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.nn.functional.normalize(torch.randn(regions, D, generator=generator), dim=1)
    rows = torch.nn.functional.normalize(torch.randn(count, D, generator=generator), dim=1)
    cosines = np.einsum("rd,kd->rk", array(embeddings), array(rows))
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    found = cosine_logits(embeddings, rows, temperature=tau, bias=bias)
    np.testing.assert_allclose(array(found), cosines / tau + bias, **tolerance)
    np.testing.assert_allclose(array(cosine_logits(embeddings, rows, scale=tau)), tau * cosines, **tolerance)
    powers = np.exp(cosines / tau)
    expected = powers / powers.sum(1, keepdims=True)
    np.testing.assert_allclose(array(column_probabilities(embeddings, rows, tau)), expected, atol=1e-4)
    double = cosine_logits(embeddings.double(), rows, temperature=tau)
    assert double.dtype == torch.float64
    np.testing.assert_allclose(array(double), cosines / tau, atol=1e-12)
    of_each = cosine_logits(embeddings[:, None], rows.expand(regions, count, D), temperature=tau)[:, 0]
    np.testing.assert_allclose(array(of_each), cosines / tau, **tolerance)  # rows of each image
