"""The worked example: its loss against a reference, and training steps of a micro model."""

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from ovdet2.config import check_methods, get_cfg, load_config
from ovdet2.data.samples import as_samples
from ovdet2.data.source_spec import source_specs
from ovdet2.errors import CacheError, UsageError
from ovdet2.modeling.rcnn.part import RCNNPart
from projects.Example.example import METHOD
from projects.Example.example.relations import RelatedRegions, Relations, relational_loss
from tests import micro

PATH = "projects.Example.example"


def unit(rows, dim=8, seed=0):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_loss_equals_float64_reference():
    student, teacher = unit(5).double(), unit(5, seed=1).double()
    expected = np.mean(
        [
            (float(student[i] @ student[j]) - float(teacher[i] @ teacher[j])) ** 2
            for i in range(5)
            for j in range(5)
        ]
    )  # fmt: skip
    assert float(relational_loss(student, teacher)) == pytest.approx(expected, rel=1e-12)


def test_loss_of_few_regions_and_in_another_order():
    assert float(relational_loss(unit(0), unit(0))) == 0.0
    assert float(relational_loss(unit(1), unit(1, seed=3))) == pytest.approx(0.0, abs=1e-12)
    student, teacher, order = unit(6), unit(6, seed=1), torch.randperm(6)
    torch.testing.assert_close(relational_loss(student, teacher), relational_loss(student[order], teacher[order]))


def test_a_rotated_space_costs_nothing():
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert float(relational_loss(unit(4).double() @ rotation, unit(4).double())) == pytest.approx(0.0, abs=1e-12)


def configured(weight=2.0):
    return load_config("ovshapes/vild_text_r18.yaml", ["MODEL.PARTS", [PATH], "MODEL.EXAMPLE.WEIGHT", weight])


def related_samples():
    samples = as_samples(micro.images(2))
    for number, sample in enumerate(samples):
        boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [10.0, 8.0, 60.0, 50.0]])[: 2 - number]
        sample.attach(RelatedRegions(boxes, unit(len(boxes), seed=number).half()))
    return samples


def test_training_step_of_a_detector():
    part = Relations({"loss_relations": 2.0})
    part.name = "example"
    assert isinstance(part, RCNNPart)
    detector = micro.model(parts=[part]).train()
    with EventStorage():
        losses, plain = detector(related_samples()), micro.model().train()(related_samples())
    assert 0 < losses["loss_relations"] < 2 * 4  # the weight times the largest squared difference of cosines
    for name, value in plain.items():
        torch.testing.assert_close(losses[name], value)
    sum(losses.values()).backward()
    assert detector.roi_heads.classifier.projection.weight.grad.abs().sum() > 0


def test_mixed_precision_on_a_cpu():
    part = Relations({"loss_relations": 2.0})
    part.name = "example"
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = micro.model(parts=[part]).train()(related_samples())
    assert torch.isfinite(losses["loss_relations"])


def test_negative_weight_is_refused():
    with pytest.raises(UsageError, match="MODEL.EXAMPLE.WEIGHT is -1.0"):
        check_methods(configured(-1.0))


def test_a_missing_cache_is_answered_with_how_to_build_it(tmp_path):
    cfg = configured()
    cfg.MODEL.EXAMPLE.REGION_CACHE = str(tmp_path / "none")
    [source] = source_specs(cfg)
    with pytest.raises(
        CacheError, match="(?s)MODEL.EXAMPLE.REGION_CACHE: there is no region cache.*ovdet2 cache build"
    ):
        METHOD.steps(cfg, source, True)


def test_configuration_finds_it_by_its_import_path():
    cfg = configured()
    assert METHOD.is_on(cfg) and not METHOD.is_on(configured(0.0))
    check_methods(cfg)
    cfg.MODEL.META_ARCHITECTURE = "OpenVocabularyDeformableDETR"
    with pytest.raises(UsageError, match="switches on example, which is for OpenVocabularyRCNN"):
        check_methods(cfg)
    assert "EXAMPLE" not in get_cfg().MODEL
