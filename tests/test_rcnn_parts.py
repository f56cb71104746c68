"""The protocol of parts on the R-CNN host: losses, weights, own boxes, images without boxes, secondary scores."""

import copy

import pytest
import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from ovdet2.data.samples import CAPTIONS, IMAGE_LABELS, Sample, as_samples
from ovdet2.errors import UsageError
from ovdet2.modeling.detr.part import DetrPart
from ovdet2.modeling.part import joined, register_parts, require_seen
from ovdet2.modeling.rcnn.part import RCNNPart
from tests import micro
from tests.test_rcnn import losses


def named(part, name):
    part.name = name
    return part


class Constant(RCNNPart):
    """A loss that is a number; notes what it is given."""

    def __init__(self, value=2.0, weight=0.5, name="loss_constant"):
        super().__init__({name: weight})
        self.value, self.loss_name, self.batches = value, name, []

    def losses(self, batch):
        self.batches.append(batch)
        return {self.loss_name: torch.tensor(self.value)}


class OwnBoxes(RCNNPart):
    """The mean of the features of boxes of its own, through the detector's head or not."""

    def __init__(self, boxes, shares_head, name):
        super().__init__()
        self.boxes, self.shares_head, self.loss_name, self.batch = boxes, shares_head, f"loss_{name}", None

    def own_boxes(self, samples):
        return [Boxes(self.boxes.clone()) for _ in samples]

    def losses(self, batch):
        self.batch = batch
        values = batch.own_features if self.shares_head else batch.own_pooled
        return {self.loss_name: values.sum() / max(len(values), 1)}


class Weak(RCNNPart):
    """Mean distance of the proposals' embeddings from the first word."""

    def __init__(self, *sees, name="loss_weak"):
        super().__init__({name: 0.25})
        self.sees, self.loss_name, self.batch = sees, name, None

    def weak_losses(self, batch):
        self.batch = batch
        boxes = [proposals[:3].proposal_boxes for proposals in batch.proposals]
        embeddings = batch.heads.embed_boxes(batch.features, boxes)
        distances = 1 - embeddings @ batch.heads.classifier.vocabulary.embeddings[0]
        return {self.loss_name: distances.view(len(batch.samples), 3).mean()}


class Scores(RCNNPart):
    """One number for all words."""

    def secondary_probs(self, batch):
        return [torch.full((count, 5), 0.2) for count in batch.counts]


FIRST = torch.tensor([[4.0, 4.0, 30.0, 28.0], [20.0, 10.0, 50.0, 60.0]])
SECOND = torch.tensor([[10.0, 12.0, 44.0, 40.0]])


def detector(*parts, **overrides):
    """Without batch statistics in the box head, so that regions do not see each other."""
    config = micro.cfg()
    config.MODEL.ROI_BOX_HEAD.NORM = ""
    for key, value in overrides.items():
        config.MODEL.OVD[key] = value
    return micro.model(config=config, parts=parts)


def captioned(count=2, kind=CAPTIONS):
    """Images without boxes, of one size."""
    samples = as_samples(micro.images(2 * count)[::2])
    for sample in samples:
        sample.kind, sample.instances, sample.captions, sample.labels = kind, None, ("a red star",), (0,)
    return samples


class TestLosses:
    def test_a_constant_loss_enters_with_its_weight_and_changes_nothing_else(self):
        part = named(Constant(), "constant")
        plain, found = losses(detector(), micro.images(2)), losses(detector(part), micro.images(2))
        assert found["loss_constant"] == 1.0
        assert {name: value for name, value in found.items() if name != "loss_constant"} == plain
        assert list(found) == ["loss_cls", "loss_box_reg", "loss_constant", "loss_rpn_cls", "loss_rpn_loc"]

    def test_what_a_part_is_given(self):
        part = named(Constant(), "constant")
        network = detector(part)
        losses(network, micro.images(2))
        [batch] = part.batches
        assert all(isinstance(sample, Sample) for sample in batch.samples) and len(batch.samples) == 2
        assert batch.counts == [len(of_image) for of_image in batch.proposals] and batch.proposals[0].has("gt_classes")
        assert len(batch.pooled) == len(batch.box_features) == sum(batch.counts)
        assert batch.heads is network.roi_heads and batch.own_pooled is None and batch.own_features is None

    def test_two_parts_with_own_boxes_each_get_their_own(self):
        one, two = named(OwnBoxes(FIRST, True, "one"), "one"), named(OwnBoxes(SECOND, False, "two"), "two")
        three = named(OwnBoxes(SECOND, True, "three"), "three")
        network = detector(one, two, three)
        found = losses(network, micro.images(2))
        heads = network.roi_heads
        for part, boxes in ((one, FIRST), (two, SECOND), (three, SECOND)):
            pooled = heads.pool(part.batch.features, [Boxes(boxes)] * 2)
            assert torch.equal(part.batch.own_pooled, pooled)
            if part.shares_head:
                assert torch.allclose(part.batch.own_features, heads.box_head(pooled), atol=1e-5)
        assert two.batch.own_features is None
        plain = losses(detector(), micro.images(2))
        assert all(torch.allclose(found[name], plain[name], rtol=1e-5) for name in plain)

    def test_order_of_parts_does_not_matter(self):
        def run(order):
            made = [
                named(OwnBoxes(FIRST, True, "one"), "one"),
                named(OwnBoxes(SECOND, True, "two"), "two"),
                named(Constant(), "constant"),
                named(Weak(CAPTIONS), "weak"),
            ]
            return losses(detector(*(made[place] for place in order)), [*micro.images(2), *captioned(1)])

        straight, swapped = run([0, 1, 2, 3]), run([3, 1, 2, 0])
        assert straight.keys() == swapped.keys()
        assert all(torch.allclose(straight[name], swapped[name], rtol=1e-5) for name in straight)

    @pytest.mark.parametrize("shares", [True, False])
    def test_own_boxes_may_be_none_at_all(self, shares):
        part = named(OwnBoxes(FIRST[:0], shares, "one"), "one")
        found = losses(detector(part), micro.images(2))
        plain = losses(detector(), micro.images(2))
        assert found["loss_one"] == 0 and all(torch.allclose(found[name], plain[name]) for name in plain)
        sum(found.values()).backward()

    def test_batch_statistics_are_shared_with_the_boxes_of_a_part(self):
        """With BatchNorm in the head, one pass: the other losses change; a part with its own head changes nothing."""
        config = micro.cfg()
        config.MODEL.ROI_BOX_HEAD.NORM = "BN"
        plain = losses(micro.model(config=config), micro.images(2))
        for shares in (True, False):
            part = named(OwnBoxes(FIRST, shares, "one"), "one")
            found = losses(micro.model(config=config, parts=[part]), micro.images(2))
            assert torch.equal(found["loss_cls"], plain["loss_cls"]) != shares

    def test_two_losses_of_one_name_are_an_error(self):
        parts = named(Constant(), "first"), named(Constant(), "second")
        with pytest.raises(UsageError, match="two losses named loss_constant"):
            losses(detector(*parts), micro.images(1))
        with pytest.raises(UsageError, match="two losses named loss_cls"):
            losses(detector(named(Constant(name="loss_cls"), "part")), micro.images(1))
        assert list(joined({"b": 1}, {}, {"a": 2})) == ["b", "a"]

    def test_masks_may_be_trained_on_predicted_boxes(self):
        """Detectron2's switch still moves the sampled boxes, after the losses that read them."""
        config = micro.cfg()
        config.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
        part = named(Constant(), "constant")
        plain, network = losses(micro.model(), micro.images(1)), micro.model(config=config, parts=[part])
        assert losses(network, micro.images(1))["loss_box_reg"] == plain["loss_box_reg"]
        pooled = network.roi_heads.pool(part.batches[0].features, [part.batches[0].proposals[0].proposal_boxes])
        assert not torch.allclose(pooled, part.batches[0].pooled)


class TestImagesWithoutBoxes:
    def test_a_step_of_captioned_images_alone(self):
        part = named(Weak(CAPTIONS), "weak")
        network = detector(part)
        found = losses(network, captioned(2))
        assert list(found) == ["loss_weak"] and 0 < found["loss_weak"] < 0.5
        found["loss_weak"].backward()
        gradients = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
        assert any(name.startswith("backbone") for name in gradients)
        assert "roi_heads.box_predictor.cls_score.projection.weight" in gradients
        assert not any(name.startswith("proposal_generator") for name in gradients)

    def test_losses_of_images_with_boxes_do_not_depend_on_the_others(self):
        part = named(Weak(CAPTIONS, IMAGE_LABELS), "weak")
        plain = losses(detector(), micro.images(2))
        first, *others = captioned(2)
        mixed = losses(detector(part), [first, *as_samples(micro.images(2)), *others])
        assert mixed.keys() - plain.keys() == {"loss_weak"} and list(mixed)[-1] == "loss_weak"
        assert all(torch.equal(mixed[name], plain[name]) for name in plain)

    def test_batch_is_the_mean_of_singles(self):
        """Without batch statistics in trunk and head."""

        def loss(samples):
            network = detector(named(Weak(CAPTIONS), "weak"))
            network.backbone.requires_grad_(False)
            for module in network.backbone.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.train = lambda mode=True, module=module: module
            return losses(network, samples)["loss_weak"].item()

        batch = captioned(2)
        assert loss(batch) == pytest.approx(sum(loss([sample]) for sample in batch) / 2, abs=1e-5)

    def test_proposing_changes_no_state_of_the_rpn(self):
        network = detector(named(Weak(CAPTIONS), "weak"))
        network.proposal_generator.rpn_head.train(False)  # a mode that somebody has chosen
        network.train()
        network.proposal_generator.rpn_head.conv.train(False)
        before = copy.deepcopy(network.proposal_generator.state_dict())
        modes = {name: module.training for name, module in network.named_modules()}
        torch.manual_seed(3)
        drawn = torch.rand(2)
        torch.manual_seed(3)
        with EventStorage() as storage:
            network(captioned(2))
            assert not storage.latest()
        assert torch.equal(torch.rand(2), drawn)
        after = network.proposal_generator.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert modes == {name: module.training for name, module in network.named_modules()}

    def test_proposals_are_those_of_the_test_and_carry_no_gradient(self):
        part = named(Weak(CAPTIONS), "weak")
        losses(detector(part), captioned(2))
        for proposals in part.batch.proposals:
            assert not proposals.proposal_boxes.tensor.requires_grad and len(proposals) > 3
            assert (proposals.objectness_logits[:-1] >= proposals.objectness_logits[1:]).all()

    def test_each_part_gets_the_kinds_that_it_sees(self):
        captions, labels = named(Weak(CAPTIONS), "first"), named(Weak(IMAGE_LABELS, name="loss_labels"), "second")
        both, blind = named(Weak(CAPTIONS, IMAGE_LABELS, name="loss_both"), "third"), named(Constant(), "fourth")
        network = detector(captions, labels, both, blind)
        one, two = captioned(2)
        two.kind = IMAGE_LABELS
        found = losses(network, [one, two])
        assert set(found) == {"loss_weak", "loss_labels", "loss_both"} and not blind.batches
        assert [part.batch.samples for part in (captions, labels, both)] == [[one], [two], [one, two]]
        for part, place in ((captions, 0), (labels, 1)):
            assert torch.equal(part.batch.features["p3"], both.batch.features["p3"][[place]])
            assert part.batch.proposals[0] is both.batch.proposals[place]

    def test_a_kind_that_no_part_sees_is_an_error(self):
        for parts in ((), (named(Weak(IMAGE_LABELS), "weak"),)):
            with pytest.raises(UsageError, match="no part .* images of kind captions"):
                losses(detector(*parts), [*micro.images(1), *captioned(1)])
            with pytest.raises(UsageError, match="captions"):
                require_seen(parts, ["boxes", CAPTIONS])
            require_seen(parts, ["boxes"])

    def test_at_test_the_kind_does_not_matter(self):
        network, samples = detector(), captioned(1)
        with torch.no_grad():
            expected = network(micro.images(1))[0]["instances"].scores
            assert torch.equal(network(samples)[0]["instances"].scores, expected)


class TestSecondaryScores:
    @torch.no_grad()
    def test_scores_of_a_part_are_used(self):
        network = detector(named(Constant(), "constant"), named(Scores(), "scores"), SECONDARY_USE="only")
        outputs = network(micro.images(2))
        assert all((output["instances"].scores == 0.2).all() for output in outputs)

    @torch.no_grad()
    def test_two_parts_that_give_them_are_an_error(self):
        with pytest.raises(UsageError, match="first and second both compute secondary scores"):
            detector(named(Scores(), "first"), named(Scores(), "second"))(micro.images(1))

    @torch.no_grad()
    @pytest.mark.parametrize("wrong", [lambda probs: probs[:1], lambda probs: [rows[:, :2] for rows in probs]])
    def test_scores_of_another_shape_are_an_error(self, wrong):
        class Wrong(Scores):
            def secondary_probs(self, batch):
                return wrong(super().secondary_probs(batch))

        with pytest.raises(UsageError, match="the part scores gives secondary scores of shapes"):
            detector(named(Wrong(), "scores"))(micro.images(2))

    @torch.no_grad()
    def test_size_of_an_image_of_no_data_set_is_that_of_its_pixels(self):
        """Of records without height and width, and of samples whose size is not known (0)."""
        network, [record] = detector(), micro.images(1)
        expected = network([record])[0]
        for image in ({"image": record["image"]}, Sample(image=record["image"])):
            found = network([image])[0]
            assert torch.equal(found["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor)
            assert found["proposals"].image_size == expected["proposals"].image_size == (64, 96)


class TestNames:
    def test_parts_are_modules_under_their_names_once(self):
        part = named(Constant(), "constant")
        part.scale = torch.nn.Parameter(torch.ones(1))
        network = detector(part)
        assert network.constant is part and network.parts == (part,)
        assert [name for name in network.state_dict() if "scale" in name] == ["constant.scale"]
        copied = copy.deepcopy(network)
        assert copied.parts[0] is copied.constant and copied.constant is not part

    @pytest.mark.parametrize("name", ["", "backbone", "training", "parts", "proposals_kept", "a.b", "a part"])
    def test_names_that_cannot_be(self, name):
        with pytest.raises(UsageError, match="cannot have a part named"):
            detector(named(Constant(), name))

    def test_a_part_of_another_host(self):
        with pytest.raises(
            UsageError, match="OpenVocabularyRCNN takes parts of class RCNNPart; that of the method one is"
        ):
            detector(named(DetrPart(), "one"))

    def test_a_name_used_twice(self):
        with pytest.raises(UsageError, match="cannot have a part named 'one'"):
            register_parts(torch.nn.Module(), [named(Constant(), "one"), named(Constant(), "one")])
