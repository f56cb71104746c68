"""The part that learns from images without boxes: texts, queue, gradients, checkpoints."""

import copy

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from ovdet2.data.steps.texts import ImageTexts, SubImage, identity_of
from ovdet2.errors import UsageError
from ovdet2.layers import CosineClassifier
from ovdet2.layers.cosine_classifier import RARE_BIAS
from ovdet2.modeling.weak import CaptionQueue, RegionSet, Term, TextBatch, WeakPart
from ovdet2.modeling.weak.caption_queue import NO_IMAGE
from ovdet2.modeling.weak.part import embed_regions
from ovdet2.modeling.weak.region_word import CaptionLoss, NounLoss, TagLoss, TextLogits
from ovdet2.modeling.weak.samplers import MaxSize, TopK, WholeImage
from ovdet2.vocabulary.bank import WordBank
from tests import micro
from tests.weak_cases import captioned, cell, texts, unit

WORDS = micro.vocabulary()


def sigmoid_config():
    config = micro.cfg()
    config.MODEL.OVD.CLS_LOSS = "sigmoid"
    config.MODEL.ROI_BOX_HEAD.NORM = ""
    return config


def detector(own_bias=None, queue=6):
    """A micro detector with the three losses; their part is its last."""
    network = micro.model(config=sigmoid_config())
    each = [TextLogits(network.roi_heads.text_classifier, own_bias) for _ in range(3)]
    terms = {
        "loss_tags": Term(0.1, MaxSize(8), TagLoss(each[0])),
        "loss_captions": Term(0.2, WholeImage(), CaptionLoss(each[1], CaptionQueue(queue, 8), 0.125)),
        "loss_nouns": Term(0.3, TopK(4), NounLoss(each[2])),
    }
    part = WeakPart(terms, ImageTexts)
    part.name = "weak"
    for name in ("loss_tags", "loss_nouns"):
        part.terms[name].table = WORDS.embeddings
    network.parts = (part,)
    network.add_module("weak", part)
    return network


def losses(network, samples):
    network.train()
    torch.manual_seed(0)
    with EventStorage():
        return network(samples)


class TestTexts:
    def test_a_batch_of_sub_images(self):
        batch = TextBatch.of_cells([[cell(1, (0, 2), 2)], [cell(2, (), 0), cell(3, (1,), 1, (0.0, 0.0, 9.0, 9.0))]])
        assert batch.image_of.tolist() == [0, 1, 1] and batch.ids.tolist() == [1, 2, 3] and len(batch) == 3
        assert batch.caption_of.tolist() == [0, 0, 2] and batch.caption_ids.tolist() == [1, 1, 3]
        assert batch.tag_targets(3).tolist() == [[True, False, True], [False] * 3, [False, True, False]]
        assert torch.equal(batch.captions, torch.cat([unit(2, 1), unit(1, 3)]))

    def test_images_of_two_sources_with_one_id_are_two_images(self):
        assert identity_of("a", 7) == identity_of("a", 7) != identity_of("b", 7)
        assert identity_of("a", 1) != identity_of("a1", 1) and -(2**63) < identity_of("", 0) < 2**63

    def test_a_region_may_show_several_sub_images(self):
        regions = RegionSet(torch.zeros(2, 4), torch.zeros(2).long(), torch.tensor([[0, 2], [1, -1]]), torch.arange(2))
        assert regions.members(3).tolist() == [[True, False, True], [False, True, False]]

    def test_a_sample_without_texts_is_named(self):
        with pytest.raises(UsageError, match="comes without ImageTexts"):
            TextBatch.of(captioned(kind=type("Other", (ImageTexts,), {})), ImageTexts)


class TestQueue:
    def test_first_in_first_out(self):
        queue = CaptionQueue(3, 8)
        for number in range(5):
            queue.columns(unit(1, number), torch.tensor([number]))
        assert sorted(queue.ids.tolist()) == [2, 3, 4]
        rows, ids = queue.columns(unit(1, 9), torch.tensor([9]))
        assert ids.tolist()[0] == 9 and sorted(ids.tolist()[1:]) == [2, 3, 4]
        assert all(torch.equal(row, unit(1, int(number))[0]) for row, number in zip(rows, ids))

    def test_more_captions_than_places(self):
        queue = CaptionQueue(2, 8)
        queue.columns(unit(5), torch.arange(5))
        assert sorted(queue.ids.tolist()) == [3, 4]

    def test_without_places_or_captions(self):
        for queue, count in ((CaptionQueue(0, 8), 2), (CaptionQueue(3, 8), 0)):
            rows, ids = queue.columns(unit(count), torch.arange(count))
            assert rows.shape == (count, 8) and len(ids) == count and (queue.ids == NO_IMAGE).all()

    def test_it_goes_on_bit_by_bit_from_its_state(self):
        straight, first = CaptionQueue(4, 8), CaptionQueue(4, 8)
        for number in range(7):
            expected = straight.columns(unit(3, number), torch.arange(3) + 10 * number)
            found = first.columns(unit(3, number), torch.arange(3) + 10 * number)
            assert all(torch.equal(a, b) for a, b in zip(expected, found))
            second = CaptionQueue(4, 8)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            first = second


def logits():
    """The detector's temperature and bias."""
    bank = WordBank(WORDS)
    return TextLogits(CosineClassifier(4, bank, temperature=micro.TEMPERATURE, bias=RARE_BIAS, background="zero"))


def caption_loss(queue=8, weight=0.5):
    return CaptionLoss(logits(), CaptionQueue(queue, 8), weight)


class TestCaptions:
    def stated(self, embeddings, columns, weight=0.5):
        """Of one caption each: columns is [(embedding, image)], the first ones are the regions' own."""
        total = 0.0
        for row, embedding in enumerate(embeddings.double()):
            positives, negatives = [], 0.0
            for caption, image in columns:
                z = (embedding @ caption.double() / micro.TEMPERATURE + RARE_BIAS).item()
                if image == columns[row][1]:
                    positives.append(F.softplus(torch.tensor(-z, dtype=torch.float64)).item())
                else:
                    negatives += weight * F.softplus(torch.tensor(z, dtype=torch.float64)).item()
            total += sum(positives) / len(positives) + negatives
        return total / len(embeddings)

    def test_the_same_image_in_the_queue_is_a_positive(self):
        loss = caption_loss()
        embeddings, first = unit(2, 50), texts(cell(1), cell(2))
        earlier = texts(SubImage(cell(1).box_xyxy, 1, unit(1, 77)), cell(5))
        loss(embeddings, WholeImage()([], earlier), earlier)
        columns = [(unit(1, 1)[0], 1), (unit(1, 2)[0], 2), (unit(1, 77)[0], 1), (unit(1, 5)[0], 5)]
        found = loss(embeddings, WholeImage()([], first), first)
        assert found.item() == pytest.approx(self.stated(embeddings, columns), rel=1e-5)

    def test_two_samples_of_one_image_are_positives_of_each_other(self):
        batch, embeddings = texts(cell(1), cell(1)), unit(2, 50)
        columns = [(unit(1, 1)[0], 1)] * 2
        assert caption_loss()(embeddings, WholeImage()([], batch), batch).item() == pytest.approx(
            self.stated(embeddings, columns), rel=1e-5
        )

    def test_an_image_without_caption_does_not_count(self):
        with_one, both = texts(cell(1)), texts(cell(1), cell(2, captions=0))
        embeddings = unit(2, 50)
        expected = caption_loss()(embeddings[:1], WholeImage()([], with_one), with_one)
        assert torch.allclose(caption_loss()(embeddings, WholeImage()([], both), both), expected)

    def test_without_any_caption_it_is_zero(self):
        batch = texts(cell(1, captions=0))
        assert caption_loss()(unit(1), WholeImage()([], batch), batch) == 0


class TestNouns:
    def test_nouns_of_the_other_images_are_negatives_unless_they_are_this_ones_too(self):
        loss = NounLoss(logits())
        loss.table = WORDS.embeddings
        batch, embeddings = texts(cell(1, (0, 3)), cell(2, (3, 4)), cell(3, (4,))), unit(6, 8)
        regions = RegionSet(
            torch.zeros(6, 4), torch.arange(6) // 2, (torch.arange(6) // 2)[:, None], torch.arange(6) // 2
        )
        z = (embeddings.double() @ WORDS.embeddings.double().T) / micro.TEMPERATURE + RARE_BIAS
        total = 0.0
        for image, (own, other) in enumerate((([0, 3], [4, 4]), ([3, 4], [0]), ([4], [0, 3, 3]))):
            rows = z[2 * image : 2 * image + 2]
            orders = [(0, 1), (1, 0)] if len(own) == 2 else [(0,), (1,)]
            best = max(orders, key=lambda order, r=rows, o=own: sum(r[row, k] for row, k in zip(order, o)))
            for row, noun in zip(best, own):
                total += F.softplus(-rows[row, noun]) + F.softplus(rows[row, other]).sum()
        assert loss(embeddings, regions, batch).item() == pytest.approx(total.item() / 3, rel=1e-5)


class TestDetector:
    @pytest.mark.slow
    def test_losses_enter_with_their_weights(self):
        network, samples = detector(), captioned()
        found = losses(network, samples)
        assert set(found) == {"loss_tags", "loss_captions", "loss_nouns"}
        again = detector()
        again.weak.loss_weights = dict.fromkeys(again.weak.loss_weights, 1.0)
        plain = losses(again, captioned())
        for name, weight in (("loss_tags", 0.1), ("loss_captions", 0.2), ("loss_nouns", 0.3)):
            assert torch.allclose(found[name], weight * plain[name])

    @pytest.mark.parametrize("own_bias", [None, pytest.param(-2.0, marks=pytest.mark.slow)])
    def test_a_weak_image_changes_no_gradient_of_rpn_and_box_regression(self, own_bias):
        network = detector(own_bias)
        sum(losses(network, captioned()).values()).backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.requires_grad}
        silent = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
        boxes = {
            name for name in gradients if name.startswith(("proposal_generator.", "roi_heads.box_predictor.bbox_pred"))
        }
        assert boxes and boxes <= silent
        bias = "roi_heads.box_predictor.cls_score.bias"
        rest = {
            name for name in silent - boxes if not name.startswith("backbone.")
        }  # the lower levels have no large region
        assert rest == ({bias} if own_bias is not None else set())

    @pytest.mark.slow
    def test_with_boxes_too_the_gradients_of_rpn_and_box_regression_are_those_without(self):
        def gradients(samples):
            network = detector()
            network.zero_grad()
            sum(losses(network, samples).values()).backward()
            return {
                name: parameter.grad
                for name, parameter in network.named_parameters()
                if name.startswith(("proposal_generator.", "roi_heads.box_predictor.bbox_pred"))
            }

        boxed, both = gradients(micro.images(2)), gradients([*micro.images(2), *captioned()])
        assert boxed and all(torch.equal(boxed[name], both[name]) for name in boxed)

    def test_regions_of_several_losses_are_embedded_in_one_pass_in_their_order(self):
        network, samples = detector(), captioned()
        seen = {}
        original = network.weak.weak_losses
        network.weak.weak_losses = lambda batch: seen.update(batch=batch) or original(batch)
        losses(network, samples)
        batch = seen["batch"]
        of = TextBatch.of(batch.samples, ImageTexts)
        sets = [sampler(batch.proposals, of) for sampler in (TopK(3), WholeImage())]
        joint = embed_regions(batch, sets)
        for of_set, rows in zip(sets, joint):
            assert torch.allclose(embed_regions(batch, [of_set])[0], rows, atol=1e-6)
            assert len(rows) == len(of_set)

    def test_the_queue_is_in_the_state_and_not_used_at_test(self):
        network = detector()
        losses(network, captioned())
        state = network.state_dict()
        assert sorted(state["weak.terms.loss_captions.queue.ids"].tolist())[-2:] == [100, 101]
        again = detector()
        again.load_state_dict(state)
        first, second = (losses(of, captioned()) for of in (network, again))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert network.weak.training_only

    def test_without_a_source_it_is_refused(self):
        with pytest.raises(UsageError, match="weak learns from captions or image labels, but no source has any"):
            detector().weak.prepare_training([])
