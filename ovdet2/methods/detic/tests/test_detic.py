"""Detic's proposals, cascade and trunks, on micro detectors."""

import re

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from ovdet2.config import check_methods, load_config
from ovdet2.data.samples import as_samples
from ovdet2.errors import NumericalError, UsageError
from ovdet2.methods.detic.centernet import best_cells, boxes_of_cells, cell_centres, select_proposals
from ovdet2.methods.detic.losses import DeticTexts
from ovdet2.methods.detic.tests.detic_cases import config, images, micro, words
from ovdet2.methods.detic.trunk import TimmTrunk
from ovdet2.modeling import OpenVocabularyRCNN
from tests import micro as two_stage
from tests.oracles.formula import uniform
from tests.weak_cases import captioned


@pytest.fixture(scope="module")
def detector():
    return micro("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0)


def detect(detector, samples):
    with torch.no_grad():
        return [output["instances"] for output in detector(samples)]


def require_same(first, second, atol=1e-4):
    assert len(first) == len(second) > 0
    assert torch.allclose(first.pred_boxes.tensor, second.pred_boxes.tensor, atol=atol)
    assert torch.allclose(first.scores, second.scores, atol=1e-5)


class TestProposals:
    def test_centres_are_half_a_stride_in(self):
        centres = cell_centres(2, 3, 8, torch.device("cpu"))
        assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]

    def test_boxes_are_left_top_right_bottom(self):
        boxes = boxes_of_cells(torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        assert boxes.tolist() == [[9, 18, 13, 24]]

    def test_a_box_without_area_gets_a_hundredth_of_a_pixel(self):
        boxes = boxes_of_cells(torch.tensor([[10.0, 20.0]]), torch.zeros(1, 4))
        assert torch.allclose(boxes, torch.tensor([[10, 20, 10.01, 20.01]]))

    @pytest.mark.parametrize("topk, expected", [(9, {0, 2, 3}), (2, {2, 3}), (0, set())])
    def test_best_cells(self, topk, expected):
        """The threshold itself is excluded."""
        assert set(best_cells(torch.tensor([0.3, 0.2, 0.9, 0.5]), 0.2, topk).tolist()) == expected

    def test_selection_keeps_ties_with_the_last_score(self):
        boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9], [60, 0, 69, 9], [60, 0, 69, 9.1]])
        kept, scores = select_proposals(boxes, torch.tensor([0.5, 0.9, 0.5, 0.2, 0.7]), 0.9, 3)
        assert torch.allclose(scores, torch.tensor([0.9, 0.7, 0.5, 0.5])) and kept[1].tolist() == boxes[4].tolist()

    def test_objectness_is_the_root_of_the_heat(self, detector):
        proposals = detector.proposal_generator
        levels = {f"p{n}": uniform(f"p{n}", (2, 64, 8 >> n - 3 or 1, 12 >> n - 3 or 1)).float() for n in range(3, 8)}
        with torch.no_grad():
            heat_logits, _ = proposals.centernet_head([levels[name] for name in proposals.in_features])[0]
            batch = detector.preprocess_image(images(2))
            outputs, losses = proposals(batch, levels)
        assert not losses and len(outputs) == 2
        for number, of_image in enumerate(outputs):
            roots = heat_logits[number].sigmoid().sqrt()
            scores = of_image.scores
            assert torch.equal(scores, scores.sort(descending=True).values) and len(of_image) <= 256
            assert torch.allclose(of_image.objectness_logits.sigmoid(), scores, atol=1e-5)
            assert (roots.max() - scores).abs().min() < 1e-6  # the best cell of P3 is never suppressed


class TestDetector:
    def test_batch_equals_singles(self, detector):
        samples = images(2)
        for batched, sample in zip(detect(detector, samples), samples):
            require_same(batched, detect(detector, [sample])[0])

    def test_the_order_of_words_permutes_the_classes(self, detector):
        samples, order = images(1), [3, 0, 4, 2, 1]
        before, bank = detect(detector, samples)[0], detector.vocabulary
        kept = bank.words
        bank.set(kept.selected(order))
        after = detect(detector, samples)[0]
        bank.set(kept)
        require_same(before, after)
        assert torch.equal(before.pred_classes, torch.tensor(order)[after.pred_classes])

    def test_one_word(self, detector):
        kept = detector.vocabulary.words
        detector.vocabulary.set(kept.selected([2]))
        assert not detector.words_compete
        only = detect(detector, images(1))[0]
        detector.vocabulary.set(kept)
        assert len(only) and not only.pred_classes.any()

    def test_scores_do_not_depend_on_other_words(self, detector):
        detector.roi_heads.box_predictor[-1].test_topk_per_image, kept = -1, detector.vocabulary.words
        every = detect(detector, images(1))[0]
        detector.vocabulary.set(kept.selected([1]))
        only = detect(detector, images(1))[0]
        detector.vocabulary.set(kept)
        detector.roi_heads.box_predictor[-1].test_topk_per_image = 300
        require_same(every[every.pred_classes == 1], only)

    def test_no_proposal_no_detection(self):
        detector = micro("MODEL.DETIC.PROPOSAL_SCORE_THRESH", 0.999999)
        found = detect(detector, images(2))
        assert [len(of_image) for of_image in found] == [0, 0] and found[0].has("pred_masks")

    def test_without_masks(self):
        (found,) = detect(micro("MODEL.MASK_ON", False, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0), images(1))
        assert len(found) and not found.has("pred_masks")

    def test_the_stages_share_one_word_bank(self, detector):
        banks = {id(predictor.cls_score.vocabulary) for predictor in detector.roi_heads.box_predictor}
        assert banks == {id(detector.vocabulary)}
        names = [name for name in detector.state_dict() if name.endswith("vocabulary.embeddings")]
        assert names == ["roi_heads.box_predictor.0.cls_score.vocabulary.embeddings"]

    @pytest.mark.parametrize("stage", [0, 2])
    def test_a_box_that_is_not_finite_is_reported(self, stage):
        detector = micro()
        with torch.no_grad():
            detector.roi_heads.box_predictor[stage].bbox_pred[2].bias[0] = float("nan")
        with pytest.raises(NumericalError, match="not finite"):
            detect(detector, images(1))

    def test_training_is_refused(self, detector):
        with pytest.raises(UsageError, match="published weights for detection only"):
            detector.proposal_generator.train()(None, {})
        detector.proposal_generator.eval()
        with pytest.raises(UsageError, match="published weights for detection only"):
            detector.roi_heads.train()(None, {}, [])
        detector.roi_heads.eval()


class TestTrunk:
    @pytest.mark.parametrize("name, channels", [("resnet18", 128), ("convnext_tiny", 192)])
    def test_maps(self, name, channels):
        trunk = TimmTrunk(name)
        shapes = trunk.output_shape()
        assert {key: (spec.channels, spec.stride) for key, spec in shapes.items()} == {
            "res3": (channels, 8), "res4": (2 * channels, 16), "res5": (4 * channels, 32)
        }  # fmt: skip
        with torch.no_grad():
            maps = trunk(torch.zeros(1, 3, 64, 96))
        assert {key: tuple(level.shape[-2:]) for key, level in maps.items()} == {
            "res3": (8, 12), "res4": (4, 6), "res5": (2, 3)
        }  # fmt: skip

    def test_batch_norms_are_frozen(self):
        kinds = {type(module).__name__ for module in TimmTrunk("resnet18").modules()}
        assert "FrozenBatchNorm2d" in kinds and not any(kind.startswith("BatchNorm") for kind in kinds)

    @pytest.mark.parametrize("name", ["vit_base_patch16_224", "resnet7", ""])
    def test_other_trunks_are_refused(self, name):
        with pytest.raises(UsageError, match=re.escape(f"MODEL.DETIC.TRUNK is {name!r}")):
            TimmTrunk(name)


@pytest.mark.parametrize("overrides, message", [
    (["MODEL.OVD.CLS_LOSS", "softmax"], "a sigmoid for each word"),
    (["MODEL.OVD.SECONDARY_SCORES", "image"], "no secondary scores"),
    (["MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False], "CLS_AGNOSTIC_MASK"),
    (["MODEL.PROPOSAL_GENERATOR.NAME", "RPN"], "PROPOSAL_GENERATOR.NAME is RPN"),
    (["MODEL.DETIC.PROPOSAL_SCORE_THRESH", 1.0], "a probability"),
    (["MODEL.META_ARCHITECTURE", "FrozenVLMRCNN"], "which is for OpenVocabularyRCNN"),
])  # fmt: skip
def test_settings_that_are_not_read_are_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        check_methods(config(*overrides))


class TestRes5Heads:
    @staticmethod
    def of(*overrides):
        narrow = ["MODEL.DEVICE", "cpu", "MODEL.RPN.POST_NMS_TOPK_TEST", 10, *overrides]
        rows = F.normalize(2 * uniform("rows", (5, 8)).float() - 1, dim=1)
        return OpenVocabularyRCNN(load_config("ovcoco/detic_r50.yaml", narrow), vocabulary=words(rows)).eval()

    def test_a_training_step(self):
        few = ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 6, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 10, "MODEL.DETIC.CAPTION_WEIGHT",
               0.1, "MODEL.DETIC.QUEUE", 4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8]  # fmt: skip
        detector, samples = self.of(*few).train(), captioned(DeticTexts)
        with EventStorage():
            losses = detector([*as_samples(two_stage.images(2)), *samples])
        assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc", "loss_captions"}
        sum(losses.values()).backward()
        idle = [name for name, weight in detector.named_parameters() if weight.requires_grad and weight.grad is None]
        assert not idle and all(torch.isfinite(loss) for loss in losses.values())

    def test_masks_and_boxes_of_other_parts_are_refused(self):
        heads, proposals = self.of().roi_heads.train(), []
        heads.mask_on, heads.label_and_sample_proposals = True, lambda *_: proposals
        heads.pool = lambda *_: torch.zeros(0, 2048, 1, 1)
        heads._predictor.losses = lambda *_: {}
        with pytest.raises(UsageError, match="trains no masks"):
            heads(None, {}, [], [])

    def test_no_word_competes(self):
        detector = self.of()
        assert not detector.words_compete and detector.roi_heads.num_classes == 5
        assert detector.roi_heads.classifier.temperature == 0.02 and detector.roi_heads.classifier.bias is None

    def test_other_proposals_are_refused(self):
        with pytest.raises(UsageError, match='takes the proposals of "RPN"'):
            self.of("MODEL.PROPOSAL_GENERATOR.NAME", "CenterNetProposals")


def test_an_unknown_level_is_refused():
    rows = F.normalize(torch.ones(1, 8), dim=1)
    with pytest.raises(UsageError, match="IN_FEATURES names"):
        OpenVocabularyRCNN(
            config("MODEL.RPN.IN_FEATURES", ["p3", "p9"], "MODEL.DETIC.TRUNK", "resnet18"), vocabulary=words(rows)
        )
