"""FrozenVLMRCNN: losses and scores against float64, what stays frozen, properties, bad input, golden micro-model."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from safetensors.torch import load_file, save_file

import ovdet2
from ovdet2 import Detector
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.engine.optimizer import build_optimizer
from ovdet2.errors import DataError, UsageError
from ovdet2.layers import CosineClassifier
from ovdet2.methods.fvlm.tests import fvlm_cases
from ovdet2.modeling import FrozenVLMRCNN, OpenVocabularyRCNN
from ovdet2.modeling.losses import background_weighted_cross_entropy
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank
from tests import micro

GOLDEN = Path(__file__).parent
ASSET = Path(ovdet2.__file__).parent / "assets" / "open_clip" / "ovshapes-resnet.safetensors"
EMBEDDED = ("DATASETS.TEST", ("ov_shapes_val_all",), "MODEL.VOCABULARY.TEMPLATES", "single")


def losses(network, records):
    network.train()
    torch.manual_seed(0)  # Detectron2 shuffles what it samples, even when it samples all
    with EventStorage():
        return network(records)


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def proposals_of(boxes, size=(64, 96)):
    found = Instances(size)
    found.proposal_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return found


class TestDetector:
    """What is trained."""

    def test_logits_and_loss_equal_float64_reference(self):
        """cos / (s tau) to base words and "background"; background regions weigh 0.9 of the mean over all regions."""
        predictor = fvlm_cases.model().train().roi_heads.box_predictor
        layer, features = predictor.cls_score, micro.wave((9, 32), 0.21)
        labels = torch.tensor([0, 1, 2, 3, 3, 3, 2, 1, 3])  # 3 is background: B = 3
        proposals = proposals_of([[1, 1, 20, 20]] * 9)
        proposals.gt_boxes, proposals.gt_classes = Boxes(torch.tensor([[2.0, 3.0, 25.0, 22.0]] * 9)), labels
        with EventStorage():
            found = predictor.losses(predictor(features), [proposals])["loss_cls"]
        assert layer.projection.bias is None and predictor.background_weight == 0.9
        regions = unit(features.double() @ layer.projection.weight.detach().double().T)
        columns = torch.cat([micro.vocabulary().embeddings[:3], fvlm_cases.background()[None]]).double()
        logits = regions @ columns.T / (micro.TEMPERATURE * torch.tensor(0.25, dtype=torch.float64).exp())
        weights = torch.where(labels == 3, 0.9, 1.0).double()
        expected = -(weights * logits.log_softmax(1)[torch.arange(9), labels]).sum() / 9
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_background_weight_of_one_is_plain_cross_entropy_and_no_region_is_zero(self):
        logits, labels = micro.wave((6, 4), 0.4), torch.tensor([0, 3, 3, 1, 2, 3])
        expected = torch.nn.functional.cross_entropy(logits, labels)
        assert background_weighted_cross_entropy(logits, labels, 1.0).item() == pytest.approx(expected.item(), rel=1e-6)
        assert background_weighted_cross_entropy(logits[:0], labels[:0], 0.9).item() == 0

    @pytest.mark.parametrize("kind", fvlm_cases.KINDS)
    def test_training_leaves_clip_bit_identical_and_trains_the_rest(self, kind):
        """Weights, statistics and attention pool; weight decay reaches none of them, no activation is kept."""
        network = fvlm_cases.model(kind)
        before = copy.deepcopy(network.state_dict())
        optimizer = build_optimizer(fvlm_cases.cfg("SOLVER.BASE_LR", 0.01, "SOLVER.WEIGHT_DECAY", 0.5), network)
        maps = network.backbone.trunk.train()(torch.randn(1, 3, 64, 64))
        assert maps[network.backbone.trunk.last_map].grad_fn is None
        for _ in range(2):
            optimizer.zero_grad()
            sum(losses(network, micro.images(2)).values()).backward()
            optimizer.step()
        after = network.state_dict()
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert moved == trained and not any(name.startswith("backbone.trunk.visual.") for name in moved)
        assert any(name.startswith("backbone.pyramid.") for name in moved)
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)

    @pytest.mark.parametrize("kind", fvlm_cases.KINDS)
    def test_a_trunk_that_is_not_frozen_is_trained(self, kind):
        network = fvlm_cases.model(kind, fvlm_cases.FREE)
        sum(losses(network, micro.images(2)).values()).backward()
        visual = network.backbone.trunk.visual
        assert visual.conv1.weight.grad.abs().sum() > 0
        assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []

    def test_novel_embeddings_cannot_reach_the_loss(self):
        words = micro.vocabulary()
        words.embeddings[3:] = words.embeddings[3:].flip(0) * -1
        plain = losses(fvlm_cases.model(), micro.images(2))
        for name, value in losses(fvlm_cases.model(words=words), micro.images(2)).items():
            assert torch.equal(value, plain[name]), name

    @pytest.mark.parametrize("k", [1, 2])
    def test_training_on_few_words(self, k):
        records = micro.images(1)
        records[0]["instances"].gt_classes[:] = 0
        network = fvlm_cases.model(words=micro.vocabulary(micro.NAMES[:k], num_base=1))
        found = losses(network, records)
        sum(found.values()).backward()
        assert all(torch.isfinite(value) for value in found.values()) and network.roi_heads.num_classes == 1


class TestScores:
    """What CLIP adds at test."""

    @torch.no_grad()
    @pytest.mark.parametrize("kind", fvlm_cases.KINDS)
    def test_fused_scores_equal_float64_reference(self, kind):
        """Of the proposals before refinement: both softmaxes, exponents, the detector's background, the sum of 1."""
        network, record = fvlm_cases.model(kind), micro.images(1)
        images, features, proposals = network._propose(record)
        network.roi_heads(images, features, proposals, None, record, network.parts)
        trunk, boxes = network.backbone.trunk, proposals[0].proposal_boxes.tensor
        maps = trunk(images.tensor)[trunk.last_map]
        regions = trunk.embed_regions(maps, [boxes]).double()
        columns = torch.cat([micro.vocabulary().embeddings, fvlm_cases.background()[None]]).double()
        clip = (regions @ columns.T / 0.3).softmax(1)
        assert torch.allclose(proposals[0].secondary_probs.double(), clip, atol=1e-5) and clip.max() < 0.99
        predictor, logits = network.roi_heads.box_predictor, micro.wave((len(boxes), 6), 0.4)
        [found] = predictor.predict_probs((logits, None), proposals)
        own = logits.double().softmax(1)
        novel = torch.tensor([0, 0, 0, 1, 1]).double()
        exponents = 0.35 + 0.3 * novel
        fused = torch.cat([own[:, :5] ** (1 - exponents) * clip[:, :5] ** exponents, own[:, 5:]], 1)
        assert torch.allclose(found.double(), fused / fused.sum(1, keepdim=True), atol=1e-6)
        predictor.renormalize = False
        assert torch.allclose(predictor.predict_probs((logits, None), proposals)[0].double(), fused, atol=1e-6)

    def test_part_owns_nothing_and_follows_a_copy_of_the_detector(self):
        """No weight, no entry in a checkpoint; the copy's scores are read from the copy's trunk and words."""
        network = fvlm_cases.model()
        assert [part.name for part in network.parts] == ["fvlm"] and not network.fvlm.state_dict()
        copied = copy.deepcopy(network)
        backbone, bank = copied.fvlm._of_detector
        assert backbone is copied.backbone and bank is copied.vocabulary and copied.parts[0] is copied.fvlm

    @torch.no_grad()
    def test_region_embedding_of_the_whole_image_is_clips_own(self):
        """At CLIP's native size the trunk's last map, pooled over the whole image, is encode_image."""
        visual = fvlm_cases.tower("resnet")
        network, pixels = fvlm_cases.model("resnet"), micro.wave((2, 3, 64, 64), 0.37)
        features = network.backbone(pixels)
        found = network.backbone.embed_regions(features, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])] * 2)
        assert torch.allclose(found, unit(visual(pixels)), atol=1e-5)

    @torch.no_grad()
    def test_fusion_comes_before_the_threshold(self):
        """A detection that the detector alone scores below it is kept if the fused score is above."""
        network, record = fvlm_cases.model(), micro.images(1)
        fused = network(record)[0]["instances"].scores
        alone = fvlm_cases.model(overrides=("MODEL.OVD.SECONDARY_SCORES", "none"))
        detector = alone(record)[0]["instances"].scores
        assert fused.shape == detector.shape and not torch.allclose(fused, detector, atol=1e-3)
        threshold = (detector.max() + fused.max()).item() / 2
        for model, best in ((network, fused.max()), (alone, detector.max())):
            model.roi_heads.box_predictor.test_score_thresh = threshold
            assert (len(model(record)[0]["instances"]) > 0) == (best > threshold)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", fvlm_cases.KINDS)
    def test_batch_equals_singles(self, kind):
        network, records = fvlm_cases.model(kind), micro.images(3)[::2]
        for record, both in zip(records, network(records)):
            alone, both = network([record])[0]["instances"], both["instances"]
            assert torch.allclose(alone.scores, both.scores, atol=1e-4) and len(alone) > 0
            # Equal scores may come in another order, and the last ones be cut off.
            kept = alone[alone.scores > alone.scores.min() + 1e-3]
            rows = [
                torch.cat([f.pred_boxes.tensor, 1e4 * f.pred_classes[:, None], 100 * f.scores[:, None]], dim=1)
                for f in (kept, both)
            ]  # boxes to 0.01 px, the same class, scores to 1e-4
            assert len(kept) > 10 and (rows[0][:, None] - rows[1]).abs().amax(dim=2).amin(dim=1).max() < 1e-2

    @torch.no_grad()
    def test_permuting_the_vocabulary_permutes_the_detections(self):
        network, record = fvlm_cases.model(), micro.images(1)
        straight = network(record)[0]["instances"]
        order = torch.tensor([2, 0, 4, 1, 3])
        words = micro.vocabulary()
        names = [words.names[i] for i in order]
        network.vocabulary.set(
            Vocabulary(names, words.base_mask[order], words.embeddings[order], words.teacher, "single")
        )
        permuted = network(record)[0]["instances"]
        assert torch.allclose(straight.scores, permuted.scores, atol=1e-6)
        assert torch.equal(straight.pred_classes, order[permuted.pred_classes])

    @torch.no_grad()
    @pytest.mark.parametrize("k", [1, 3, 1203])
    def test_any_number_of_words(self, k):
        network = fvlm_cases.model()
        network.vocabulary.set(micro.vocabulary([f"word {i}" for i in range(k)], 0))
        found = network(micro.images(1))[0]["instances"]
        assert 0 < len(found) <= 100 and (found.pred_classes < k).all()

    @torch.no_grad()
    def test_masks_are_one_per_region(self):
        network = fvlm_cases.model(overrides=("MODEL.MASK_ON", True))
        found = network(micro.images(1))[0]["instances"]
        assert network.roi_heads.mask_head.predictor.weight.shape[0] == 1
        assert len(found) > 0 and found.pred_masks.shape == (len(found), 64, 96)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", fvlm_cases.KINDS)
    def test_images_without_proposals(self, kind):
        network, record = fvlm_cases.model(kind), micro.images(2)
        images, features, proposals = network._propose(record)
        for empty in ([proposals[0][:0], proposals[1]], [found[:0] for found in proposals]):
            results, _ = network.roi_heads(images, features, empty, None, record, network.parts)
            assert [found.secondary_probs.shape for found in empty] == [(len(found), 6) for found in empty]
            assert len(results[0]) == 0 and (len(results[1]) > 0) == (len(empty[1]) > 0)


class TestFormOfTheRelease:
    """Norms per level in the RPN, of the outputs of the FPN and in the mask head; p6 by a convolution; square input."""

    @pytest.mark.parametrize("kind", fvlm_cases.KINDS)
    def test_a_step_trains_all_but_clip(self, kind):
        network, records = fvlm_cases.model(kind, fvlm_cases.RELEASE), micro.images(2)
        network.square = 128
        for record in records:
            height, width = record["image"].shape[1:]
            bits = torch.zeros(2, height, width, dtype=torch.bool)
            bits[:, 8:40, 8:40] = True
            record["instances"].gt_masks = BitMasks(bits)
        found = losses(network, records)
        assert "loss_mask" in found and all(torch.isfinite(value) for value in found.values())
        sum(found.values()).backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
        norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
        trained = [norm for norm in norms if norm.weight.requires_grad]
        # 5 of the FPN, 2 x 5 of the RPN, 4 + 4 + 1 of the heads, and on a ViT that of the resampling.
        assert len(trained) == 24 + (kind == "vit") and all(norm.num_batches_tracked >= 1 for norm in trained)
        assert network.backbone.pyramid.norms["p6"].num_batches_tracked == 1

    @torch.no_grad()
    @pytest.mark.parametrize("kind", fvlm_cases.KINDS)
    def test_detections(self, kind):
        """With masks, in pixels of the image, whatever the batch."""
        network, records = fvlm_cases.model(kind, fvlm_cases.RELEASE), micro.images(2)
        network.square = 128
        for record, output in zip(records, network(records), strict=True):
            found, alone = output["instances"], network([record])[0]["instances"]
            assert len(found) > 0 and found.pred_masks.shape[1:] == found.image_size == (
                record["height"],
                record["width"],
            )
            assert torch.allclose(found.scores, alone.scores, atol=1e-4)

    def test_anchors_are_centred_at_half_a_stride(self):
        generator = fvlm_cases.model("resnet", fvlm_cases.RELEASE).proposal_generator.anchor_generator
        maps = [torch.zeros(1, 1, 4, 6)] * 5
        for stride, anchors in zip((4, 8, 16, 32, 64), generator(maps), strict=True):
            centres = anchors.get_centers().view(4, 6, 3, 2)
            assert torch.allclose(centres[2, 1, 0], torch.tensor([1.5 * stride, 2.5 * stride]))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(configuration, checkpoint) of a network on the embedded ResNet, as the configuration builds it."""
    config = fvlm_cases.cfg(*EMBEDDED)
    folder = tmp_path_factory.mktemp("fvlm")
    AtomicCheckpointer(FrozenVLMRCNN(config), str(folder)).save("model_final")
    return config, folder / "model_final.pth"


class TestByConfiguration:
    """The whole detector, its vocabulary and what does not go together."""

    def test_new_words_bring_the_background_of_their_prompts(self, embedded):
        config, weights = embedded
        predictor, teacher = Detector(config, weights), Teacher.load("ovshapes-resnet", "embedded")
        vocabulary = predictor.model.vocabulary
        assert len(predictor.names) == 65
        for words, templates, prompts in (
            ("striped moon, red star", None, "single"),
            ("striped moon", "vild63", "vild63"),
            (Vocabulary.build(["red star"], teacher, "photo12"), None, "photo12"),
        ):
            predictor.set_vocabulary(words, templates)
            expected = Vocabulary.build(["background"], teacher, prompts).embeddings[0]
            assert torch.allclose(vocabulary.background, expected, atol=1e-6), prompts
        assert vocabulary.num_detectable == 1 and vocabulary.words.base_mask.tolist() == [False] + 48 * [
            True
        ]  # competitors
        found = predictor.predict((micro.wave((64, 96, 3), 0.1).numpy() * 127 + 127).astype("uint8"))
        assert len(found) > 0 and (found.pred_classes == 0).all()

    def test_trunk_is_the_teachers(self, embedded):
        network, teacher = FrozenVLMRCNN(embedded[0]), Teacher.load("ovshapes-resnet", "embedded")
        trunk = network.backbone.trunk.visual.state_dict()
        for name, tensor in teacher.clip.visual.state_dict().items():
            if "num_batches" not in name:
                assert torch.equal(trunk[name], tensor), name

    def test_vocabulary_of_another_teacher(self, embedded):
        words = micro.vocabulary(dim=128, teacher=Fingerprint("ovshapes-resnet", "embedded", "1" * 64))
        with pytest.raises(DataError, match="the trunk .MODEL.TEACHER.*the vocabulary is of teacher"):
            FrozenVLMRCNN(embedded[0], vocabulary=words)

    def test_checkpoint_of_another_architecture(self, tmp_path):
        """The kind of trunk, and the teacher."""
        AtomicCheckpointer(fvlm_cases.model("vit"), str(tmp_path)).save("vit")
        with pytest.raises(DataError, match="does not hold .* backbone.trunk.visual"):
            AtomicCheckpointer(fvlm_cases.model("resnet")).load_all(str(tmp_path / "vit.pth"))
        words = micro.vocabulary(teacher=Fingerprint("micro", "test", "1" * 64))
        with pytest.raises(DataError, match="the checkpoint.*of teacher"):
            AtomicCheckpointer(fvlm_cases.model("vit", words=words)).load_all(str(tmp_path / "vit.pth"))

    def test_statistics_that_a_file_lacks_stay_clips(self, tmp_path):
        """Detectron2 would set them to zeros and ones."""
        network = fvlm_cases.model("resnet")
        before = copy.deepcopy(network.backbone.state_dict())
        torch.save({"model": {"roi_heads.box_predictor.bbox_pred.bias": torch.ones(4)}}, tmp_path / "head.pth")
        AtomicCheckpointer(network).load(str(tmp_path / "head.pth"))
        assert network.roi_heads.box_predictor.bbox_pred.bias.tolist() == [1.0] * 4
        assert all(torch.equal(value, before[name]) for name, value in network.backbone.state_dict().items())

    def test_weights_of_another_resolution(self, tmp_path):
        """A pool of another grid than the architecture's native size has."""
        tensors = load_file(str(ASSET))
        name = "visual.attnpool.positional_embedding"
        tensors[name] = torch.cat([tensors[name], tensors[name][:7]])  # 17 = 4 x 4 + 1 rows: 128 pixels
        save_file(tensors, str(tmp_path / "wrong.safetensors"))
        with pytest.raises(DataError, match="(?s)wrong.safetensors.*attnpool.positional_embedding.*17"):
            Teacher.load("ovshapes-resnet", str(tmp_path / "wrong.safetensors"))

    @pytest.mark.parametrize("overrides, words", [
        (("MODEL.BACKBONE.FREEZE_AT", 2), "fvlm requires a frozen trunk.*FREEZE_AT to 5 .now 2"),
        (("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"), "build_clip_fpn_backbone"),
        (("MODEL.FVLM.TEMPERATURE", 0.0), "above 0"),
        (("INPUT.FORMAT", "BGR"), "INPUT.FORMAT to RGB"),
        (("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"]), "attention pool reads res5"),
        (("MODEL.OVD.BACKGROUND_WEIGHT", -1.0), "BACKGROUND_WEIGHT is -1"),
        (("MODEL.OVD.CLASSIFIER", "other"), '"text_background" or "closed_set"'),
        (("MODEL.OVD.CLS_LOSS", "sigmoid"), "BACKGROUND_WEIGHT .*must be 1"),
    ])  # fmt: skip
    def test_settings_that_do_not_go_together(self, overrides, words):
        with pytest.raises(UsageError, match=words):
            FrozenVLMRCNN(fvlm_cases.cfg(*EMBEDDED, *overrides))

    def test_only_a_detector_on_clip_gives_scores_of_its_map(self):
        config = fvlm_cases.cfg(*EMBEDDED, "MODEL.META_ARCHITECTURE", "OpenVocabularyRCNN")
        with pytest.raises(UsageError, match="fvlm, which is for FrozenVLMRCNN"):
            OpenVocabularyRCNN(config)

    def test_a_text_background_needs_its_embedding(self):
        with pytest.raises(UsageError, match="WordBank a background"):
            CosineClassifier(12, WordBank(micro.vocabulary()), temperature=0.01, background="text")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", fvlm_cases.KINDS)
def test_devices_agree(kind):
    """Losses and fused scores on CUDA are those on the CPU."""
    network = fvlm_cases.model(kind)
    expected, scores = losses(network, micro.images(2)), network.eval()(micro.images(2))
    network.cuda()
    found, on_cuda = losses(network, micro.images(2)), network.eval()(micro.images(2))
    for name, loss in expected.items():
        assert found[name].is_cuda and found[name].item() == pytest.approx(loss.item(), rel=1e-2, abs=1e-4)
    for one, other in zip(scores, on_cuda, strict=True):
        ours, theirs = (output["instances"].scores.cpu()[:5] for output in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


def golden_tensors(kind):
    """See :func:`tests.micro.golden_rcnn`."""
    return micro.golden_rcnn(fvlm_cases.model(kind), losses)


@pytest.mark.parametrize("kind", fvlm_cases.KINDS)
def test_golden(kind):
    """Tolerances: 1e-3 relative (gradients 1e-2), for the order of sums differs. Rewrite:
    python -m ovdet2.methods.fvlm.tests.test_fvlm.
    """
    micro.assert_golden(GOLDEN / f"golden_{kind}.safetensors", golden_tensors(kind), gradient_atol=1e-3)


if __name__ == "__main__":
    for kind in fvlm_cases.KINDS:
        save_file(golden_tensors(kind), str(GOLDEN / f"golden_{kind}.safetensors"))
