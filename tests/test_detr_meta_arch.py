"""The wiring of OpenVocabularyDeformableDETR, around a network of two layers: what goes in and what comes out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import NumericalError, UsageError
from ovdet2.modeling import OpenVocabularyDeformableDETR
from ovdet2.modeling.detr.criterion import SetCriterion
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.memory import EncoderOutputs
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.postprocess import PostProcessor
from ovdet2.vocabulary.bank import WordBank
from tests import detr_cases, micro

LAYERS, QUERIES = 2, 6
WEIGHTS = {"loss_class": 2.0, "loss_l1": 5.0, "loss_giou": 0.5}


class StandIn(nn.Module):
    """Queries from the mean colour of the part that is no padding; logits by cosine to the words."""

    def __init__(self, vocabulary, two_stage=False):
        super().__init__()
        self.words = (vocabulary,)  # owned by the detector
        self.backbone = nn.Conv2d(3, 4, 1)
        self.backbone.size_divisibility = 32
        self.embed, self.boxes = nn.Linear(4, LAYERS * QUERIES * 8), nn.Linear(4, LAYERS * QUERIES * 4)
        self.two_stage, self.seen = two_stage, []

    @property
    def transformer(self):
        return SimpleNamespace(queries=lambda memory: None)

    def encode(self, images, image_sizes):
        self.seen.append((images, image_sizes))
        maps = self.backbone(images)
        return torch.stack([m[:, :h, :w].mean(dim=(1, 2)) for m, (h, w) in zip(maps, image_sizes)])

    def decode(self, means, queries, attention_mask=None, all_layers=None, keep_sampling=False):
        words = self.words[0].training_embeddings if self.training else self.words[0].embeddings
        hidden = self.embed(means).view(len(means), LAYERS, QUERIES, 8).transpose(0, 1)
        boxes = self.boxes(means).view(len(means), LAYERS, QUERIES, 4).transpose(0, 1).sigmoid()
        logits = nn.functional.normalize(hidden, dim=-1) @ words.T
        outputs = DetrOutputs(logits if all_layers else logits[-1:], boxes, hidden)
        if not self.two_stage:
            return outputs
        valid = torch.ones(len(means), QUERIES, dtype=torch.bool)
        return replace(outputs, encoder=EncoderOutputs(logits[0, :, :, :1], boxes[0], valid))


def detector(two_stage=False, words=None, auxiliary=True):
    torch.manual_seed(0)
    vocabulary = WordBank(words or micro.vocabulary())
    return OpenVocabularyDeformableDETR(
        network=StandIn(vocabulary, two_stage),
        vocabulary=vocabulary,
        criterion=SetCriterion(HungarianMatcher(), auxiliary=auxiliary),
        postprocessor=PostProcessor(20),
        loss_weights=WEIGHTS,
        pixel_mean=[100.0, 110.0, 120.0],
        pixel_std=[50.0, 60.0, 70.0],
    )


class TestTraining:
    @pytest.mark.parametrize("two_stage", [False, True])
    def test_losses_are_weighted_and_named(self, two_stage):
        model = detector(two_stage)
        losses = model(micro.images())
        places = ["", "_0", "_encoder"] if two_stage else ["", "_0"]
        assert set(losses) == {f"{kind}{place}" for kind in WEIGHTS for place in places}
        model.loss_weights = dict.fromkeys(WEIGHTS, 1.0)
        for name, value in model(micro.images()).items():
            weight = next(weight for kind, weight in WEIGHTS.items() if name.startswith(kind))
            assert losses[name].item() == pytest.approx(weight * value.item(), rel=1e-5)

    def test_every_parameter_gets_a_gradient(self):
        model = detector()
        sum(model(micro.images()).values()).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_only_base_words_have_columns(self):
        model = detector()
        records = micro.images()
        records[1]["instances"].gt_classes[0] = 3  # the first novel word
        with pytest.raises(UsageError, match="class 3.*3 columns.*id 1"):
            model(records)

    def test_nan_names_the_image(self):
        model = detector()
        records = micro.images()
        records[1]["image"] = records[1]["image"].float() * float("nan")
        with pytest.raises(NumericalError, match=r"\(id 1\)"):
            model(records)


class TestInference:
    def test_images_are_normalised_and_padded_after_it(self):
        """The network is told the sizes, in training and at test."""
        model = detector()
        for mode in (True, False):
            model.train(mode)
            records = micro.images()
            model(records)
            images, sizes = model.network.seen[-1]
            assert images.shape == (2, 3, 96, 96) and [tuple(size) for size in sizes] == [(64, 96), (80, 64)]
            expected = (records[1]["image"].float() - model.pixel_mean) / model.pixel_std
            assert torch.equal(images[1, :, :80, :64], expected)
            assert images[1, :, 80:].abs().sum() == 0 and images[1, :, :, 64:].abs().sum() == 0

    @torch.no_grad()
    def test_batch_equals_singles(self):
        model, records = detector().eval(), micro.images()
        for output, record in zip(model(records), records):
            [single] = model([record])
            assert torch.allclose(single["instances"].scores, output["instances"].scores, atol=1e-6)
            assert torch.allclose(
                single["instances"].pred_boxes.tensor, output["instances"].pred_boxes.tensor, atol=1e-4
            )

    @torch.no_grad()
    def test_boxes_are_in_pixels_of_the_original_image(self):
        """All words of all queries, the novel ones too."""
        model, [record] = detector().eval(), micro.images(1)
        [small] = model([record])
        [large] = model([record | {"height": 640, "width": 192}])
        small, large = small["instances"], large["instances"]
        assert large.image_size == (640, 192) and small.image_size == (64, 96)
        assert torch.allclose(
            small.pred_boxes.tensor * torch.tensor([2, 10, 2, 10]), large.pred_boxes.tensor, rtol=1e-4
        )
        assert len(small) == 20 and set(small.pred_classes.tolist()) >= {3, 4}

    @torch.no_grad()
    def test_every_layer_is_what_a_detector_that_ends_there_finds(self):
        model, records = detector().eval(), micro.images()
        plain = model(records)
        assert all(set(output) == {"instances"} for output in plain)
        model.every_layer = True
        found, whole = model(records), model.network.decode

        def first_layer(*args, **options):
            return detr_cases.changed(whole(*args, **options), lambda value: value[:1])

        model.network.decode = first_layer
        for output, last, first in zip(found, plain, model(records)):
            assert len(output["decoder_layers"]) == LAYERS - 1 and first["decoder_layers"] == []
            pairs = ((output["instances"], last["instances"]), (output["decoder_layers"][0], first["instances"]))
            for ours, theirs in pairs:
                assert torch.equal(ours.scores, theirs.scores) and ours.image_size == theirs.image_size
                assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
            assert not torch.equal(output["decoder_layers"][0].scores, output["instances"].scores)

    @torch.no_grad()
    def test_words_change_at_will(self):
        model, [record] = detector().eval(), micro.images(1)
        [before] = model([record])
        one = micro.vocabulary(names=("star",), num_base=0)
        model.vocabulary.set(one)
        [after] = model([record])
        assert len(after["instances"]) == QUERIES and set(after["instances"].pred_classes.tolist()) == {0}
        model.vocabulary.set(micro.vocabulary())
        [again] = model([record])
        assert torch.equal(again["instances"].scores, before["instances"].scores)

    def test_closed_set_of_other_words(self):
        model = detector().eval()
        model.network.words = (WordBank(micro.vocabulary(names=("star",), num_base=0)),)
        with pytest.raises(UsageError, match="1 classes cannot take 5 words"):
            model(micro.images())


@torch.no_grad()
def test_checkpoint_keeps_the_weights_and_takes_the_words_of_the_run(tmp_path):
    model = detector()
    AtomicCheckpointer(model, str(tmp_path)).save("model")
    other = detector(words=micro.vocabulary(names=("star", "moon"), num_base=2, frequency=0.5))
    for parameter in other.parameters():
        parameter.zero_()
    AtomicCheckpointer(other).load_all(str(tmp_path / "model.pth"))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), model.parameters()))
    assert other.vocabulary.words.names == ("star", "moon")
    assert other.vocabulary.trained_base_names == {"red star", "blue moon", "striped ring"}
    saved = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert sum(name.endswith("embeddings") for name in saved) == 1
