"""The criterion against a reference in plain float64 Python, its properties, and training that stops at NaN."""

import math
from dataclasses import replace

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

import train_net
from ovdet2.data.samples import as_samples
from ovdet2.engine import launch
from ovdet2.errors import NumericalError, UsageError
from ovdet2.modeling.detr.criterion import SetCriterion, class_targets, weighted
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.memory import EncoderOutputs
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.targets import Matches, Targets
from tests import detr_cases
from tests.micro_training import micro_opts, write_data
from tests.test_detr_matcher import corners, giou_reference

KINDS = {"loss_class", "loss_l1", "loss_giou"}


def focal_reference(logit, target, alpha=0.25, gamma=2.0):
    p = 1 / (1 + math.exp(-logit))
    if target:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


def reference(logits, boxes, targets, matches, num_boxes):
    """Sums over Python lists; logits [B][N][K] and boxes [B][N][4]."""
    label_of = dict(zip(zip(matches.image.tolist(), matches.query.tolist()), targets.labels[matches.target].tolist()))
    focal = sum(
        focal_reference(logit, label_of.get((image, query)) == word)
        for image, rows in enumerate(logits)
        for query, row in enumerate(rows)
        for word, logit in enumerate(row)
    )
    l1 = giou = 0.0
    for image, query, target in zip(matches.image.tolist(), matches.query.tolist(), matches.target.tolist()):
        box, wanted = boxes[image][query], targets.boxes_cxcywh[target].tolist()
        l1 += sum(abs(a - b) for a, b in zip(box, wanted))
        giou += 1 - giou_reference(corners(box), corners(wanted))
    return {"loss_class": focal / num_boxes, "loss_l1": l1 / num_boxes, "loss_giou": giou / num_boxes}


def criterion(**options):
    return SetCriterion(HungarianMatcher(), **options)


def with_encoder(outputs, tokens=9, seed=5):
    """Outputs with random ones of a first stage."""
    proposals = detr_cases.outputs(1, outputs.pred_logits.shape[1], tokens, words=1, seed=seed)
    valid = torch.ones(proposals.pred_boxes.shape[1:3], dtype=torch.bool)
    return replace(outputs, encoder=EncoderOutputs(proposals.pred_logits[0], proposals.pred_boxes[0], valid))


class TestValues:
    @pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-6), (torch.float32, 1e-4)])
    def test_equal_the_reference_in_every_layer(self, dtype, rtol):
        outputs, targets = detr_cases.outputs(3, 2, 6, dtype=dtype), detr_cases.targets((3, 1))
        losses, matches = criterion()(outputs, targets)
        assert set(losses) == {f"{kind}{place}" for kind in KINDS for place in ("", "_0", "_1")} and len(matches) == 3
        for layer, place in enumerate(("_0", "_1", "")):
            logits, boxes = (part[layer].double().tolist() for part in (outputs.pred_logits, outputs.pred_boxes))
            expected = reference(logits, boxes, targets, matches[layer], 4)
            for kind, value in expected.items():
                assert losses[kind + place].item() == pytest.approx(value, rel=rtol)

    def test_layers_are_matched_by_themselves(self):
        """The first layer's queries in reverse: the same losses, other pairs."""
        outputs, targets = detr_cases.outputs(1, 1, 6), detr_cases.targets((3,))
        both = detr_cases.changed(outputs, lambda value: torch.cat([value.flip(2), value]))
        losses, matches = criterion()(both, targets)
        assert not torch.equal(matches[0].query, matches[1].query)
        for kind in KINDS:
            assert losses[f"{kind}_0"].item() == pytest.approx(losses[kind].item(), rel=1e-5)

    def test_without_auxiliary_losses(self):
        outputs, targets = detr_cases.outputs(3, 2, 6), detr_cases.targets((3, 1))
        losses, matches = criterion(auxiliary=False)(outputs, targets)
        full, _ = criterion()(outputs, targets)
        assert set(losses) == KINDS and len(matches) == 1
        assert all(torch.equal(losses[kind], full[kind]) for kind in KINDS)

    def test_encoder(self):
        """Class-agnostic, over the tokens that are valid; what the others hold does not matter."""
        outputs = with_encoder(detr_cases.outputs(1, 2, 6))
        targets, encoder = detr_cases.targets((3, 1)), outputs.encoder
        encoder.valid[0, 5:] = False
        losses, _ = criterion()(outputs, targets)
        one_word, agnostic = HungarianMatcher(), targets.without_labels()
        logits, boxes = encoder.logits, encoder.boxes_cxcywh
        tokens = DetrOutputs(logits[None], boxes[None], hidden=boxes[None])
        [matches] = one_word(tokens, agnostic, encoder.valid)
        rows = [row[:5] if image == 0 else row for image, row in enumerate(logits.double().tolist())]
        expected = reference(rows, boxes.double().tolist(), agnostic, matches, 4)
        assert matches.query[matches.image == 0].max() < 5
        for kind, value in expected.items():
            assert losses[f"{kind}_encoder"].item() == pytest.approx(value, rel=1e-4)
        logits[0, 5:], boxes[0, 5:] = float("nan"), float("nan")
        again, _ = criterion()(outputs, targets)
        assert all(torch.equal(again[name], losses[name]) for name in losses)

    def test_encoder_has_a_matcher_of_its_own(self):
        """A cost that asks for what the encoder does not give."""
        words = HungarianMatcher(extra_costs=[(1.0, lambda outputs, labels: outputs.added["embeddings"])])
        outputs, targets = with_encoder(detr_cases.outputs(2, 1, 6)), detr_cases.targets((3,))
        outputs = outputs.with_added(embeddings=torch.zeros(2, 1, 6, 3))
        losses, _ = SetCriterion(words, HungarianMatcher())(outputs, targets)
        assert "loss_class_encoder" in losses
        with pytest.raises(KeyError):
            SetCriterion(words)(outputs, targets)

    def test_half_precision_is_computed_in_full(self):
        outputs, targets = detr_cases.outputs(1, 2, 6, dtype=torch.bfloat16), detr_cases.targets((3, 1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, matches = criterion()(outputs, targets)
        logits, boxes = (part[0].double().tolist() for part in (outputs.pred_logits, outputs.pred_boxes))
        expected = reference(logits, boxes, targets, matches[0], 4)
        for kind, value in expected.items():
            assert losses[kind].dtype == torch.float32 and losses[kind].item() == pytest.approx(value, rel=1e-4)


class TestProperties:
    def test_background_is_a_row_of_zeros(self):
        """A published implementation gave background the label of a class."""
        outputs, targets = detr_cases.outputs(1, 2, 6), detr_cases.targets((3, 1))
        [matches] = HungarianMatcher()(outputs, targets)
        classes = class_targets(outputs.pred_logits[0], targets, matches)
        matched = torch.zeros(2, 6, dtype=torch.bool)
        matched[matches.image, matches.query] = True
        assert classes.sum() == 4 and (classes[~matched] == 0).all()
        assert torch.equal(classes[matched].sum(dim=1), torch.ones(4))
        assert torch.equal(classes[matches.image, matches.query].argmax(dim=1), targets.labels[matches.target])

    def test_background_queries_unlearn_every_word(self):
        outputs, targets = detr_cases.outputs(1, 1, 6), detr_cases.targets((2,))
        logits = outputs.pred_logits.requires_grad_()
        losses, [matches] = criterion()(outputs, targets)
        losses["loss_class"].backward()
        background = torch.ones(6, dtype=torch.bool)
        background[matches.query] = False
        assert (logits.grad[0, 0, background] > 0).all()
        assert (logits.grad[0, 0, matches.query, targets.labels[matches.target]] < 0).all()

    def test_batch_is_the_mean_of_singles(self):
        """Weighted by their objects, since sums are divided by the number of objects."""
        outputs, made = detr_cases.outputs(2, 2, 6), detr_cases.samples((3, 1))
        batch, _ = criterion()(outputs, Targets.of_samples(made, "cpu"))
        singles = [
            criterion()(detr_cases.only(outputs, image), Targets.of_samples([made[image]], "cpu"))[0]
            for image in (0, 1)
        ]
        for name, value in batch.items():
            assert value.item() == pytest.approx((3 * singles[0][name] + singles[1][name]).item() / 4, rel=1e-5)

    def test_order_of_words_and_of_queries_does_not_matter(self):
        outputs, targets = detr_cases.outputs(1, 2, 6), detr_cases.targets((3, 1))
        losses, _ = criterion()(outputs, targets)
        words, queries = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([5, 3, 1, 0, 2, 4])
        moved = detr_cases.changed(outputs, lambda value: value[:, :, queries])
        moved = replace(moved, pred_logits=moved.pred_logits[..., words])
        relabelled = replace(targets, labels=words.argsort()[targets.labels])
        again, _ = criterion()(moved, relabelled)
        for kind in KINDS:
            assert again[kind].item() == pytest.approx(losses[kind].item(), rel=1e-5)

    @pytest.mark.parametrize("counts", [(0, 0), (0, 2), (8,)])
    def test_any_number_of_objects_trains(self, counts):
        """None at all, none in one image, more than queries (6): finite losses and gradients everywhere."""
        outputs, targets = with_encoder(detr_cases.outputs(2, len(counts), 6)), detr_cases.targets(counts)
        tensors = [outputs.pred_logits, outputs.pred_boxes, outputs.encoder.logits, outputs.encoder.boxes_cxcywh]
        for tensor in tensors:
            tensor.requires_grad_()
        losses, _ = criterion()(outputs, targets)
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in losses.values())
        assert all(torch.isfinite(tensor.grad).all() for tensor in tensors)
        if not sum(counts):
            assert losses["loss_l1"] == 0 and losses["loss_giou"] == 0 and losses["loss_class"] > 0

    def test_boxes_without_area(self):
        outputs, targets = detr_cases.outputs(1, 1, 4), detr_cases.targets((2,))
        targets.boxes_cxcywh[:, 2:] = 0
        outputs.pred_boxes[..., :2, 2:] = 0
        outputs.pred_boxes.requires_grad_()
        losses, _ = criterion()(outputs, targets)
        sum(losses.values()).backward()
        assert all(torch.isfinite(value) for value in losses.values())
        assert torch.isfinite(outputs.pred_boxes.grad).all()

    def test_one_word(self):
        losses, _ = criterion()(detr_cases.outputs(1, 1, 4, words=1), detr_cases.targets((2,), words=1))
        assert all(torch.isfinite(value) for value in losses.values())

    def test_label_beyond_the_classifier(self):
        """A novel class that reached training, or a classifier of other words."""
        with pytest.raises(UsageError, match=r"class 4.*3 columns.*0\.jpg"):
            criterion()(detr_cases.outputs(1, 1, 6, words=3), detr_cases.targets((8,), words=5, seed=3))


class TestDirectAssignment:
    def test_several_queries_per_object(self):
        """As for denoising queries: no matching, the same losses, divided by what the caller says."""
        outputs, targets = detr_cases.outputs(1, 1, 6), detr_cases.targets((3,))
        rows = torch.arange(6)
        direct = Matches(torch.zeros(6, dtype=torch.int64), rows, rows % 3)
        logits, boxes = outputs.pred_logits[0], outputs.pred_boxes[0]
        losses = criterion().losses_of(logits, boxes, targets, direct, 6)
        expected = reference(logits.double().tolist(), boxes.double().tolist(), targets, direct, 6)
        for kind, value in expected.items():
            assert losses[kind].item() == pytest.approx(value, rel=1e-4)

    def test_pairs_of_a_matching_are_those_used(self):
        outputs, targets = detr_cases.outputs(2, 2, 6), detr_cases.targets((3, 1))
        losses, matches = criterion()(outputs, targets)
        logits, boxes = outputs.pred_logits[0], outputs.pred_boxes[0]
        again = criterion().losses_of(logits, boxes, targets, matches[0], 4)
        assert all(torch.equal(again[kind], losses[f"{kind}_0"]) for kind in KINDS)


def test_weights_go_by_kind():
    losses = {"loss_l1": 1.0, "loss_l1_0": 2.0, "loss_l1_11": 3.0, "loss_l1_encoder": 4.0, "loss_giou": 5.0}
    found = weighted(losses, {"loss_l1": 10.0, "loss_giou": 0.0})
    assert found == {"loss_l1": 10, "loss_l1_0": 20, "loss_l1_11": 30, "loss_l1_encoder": 40, "loss_giou": 0}
    with pytest.raises(KeyError):
        weighted({"loss_other_1": 1.0}, {"loss_l1": 1.0})


@META_ARCH_REGISTRY.register()
class MicroQueryDetector(nn.Module):
    """Four boxes per image from its average colour; ``spoilt`` makes those of the last image NaN, from step 2 on, in
    one process."""

    spoilt_rank = None

    def __init__(self, cfg):
        super().__init__()
        self.head = nn.Linear(3, 4 * 7)
        self.criterion = criterion()
        self.steps = 0
        self.counts = []

    def forward(self, batch):
        from detectron2.utils import comm

        targets = Targets.of_samples(as_samples(batch), "cpu")
        found = self.head(torch.stack([record["image"].float().mean(dim=(1, 2)) / 255 for record in batch]))
        found = found.view(1, len(batch), 4, 7)
        outputs = DetrOutputs(found[..., :3], found[..., 3:].sigmoid(), hidden=found)
        if self.steps == 2 and self.spoilt_rank == comm.get_rank():
            outputs = replace(outputs, pred_boxes=outputs.pred_boxes + torch.tensor(float("nan")))
        self.steps += 1
        losses, _ = self.criterion(outputs, targets)
        return weighted(losses, dict.fromkeys(KINDS, 1.0))


@META_ARCH_REGISTRY.register()
class SpoiltMicroQueryDetector(MicroQueryDetector):
    """NaN in the last of two processes."""

    spoilt_rank = 1


def train_two(args):
    """One process of train_net, where this module's models are registered."""
    return train_net.main(args)


def test_nan_in_one_process_stops_all_and_names_the_image(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_data(tmp_path)
    options = [*micro_opts(tmp_path / "out"), "MODEL.META_ARCHITECTURE", "SpoiltMicroQueryDetector"]
    with pytest.raises(NumericalError, match=r"iteration 2.*\n.*process 0: loss_class") as caught:
        launch(train_two, 2, args=(train_net.parse_args(options),), use_cuda=False)
    assert "process 1: the cost of matching queries with the objects of" in str(caught.value)
    assert ".png (id " in str(caught.value).split("process 1:")[1].split("is not finite")[0]


def count_boxes(folder):
    """In each process: rank + 1 objects, hence 1.5 on average; then none at all."""
    from detectron2.utils import comm

    from ovdet2.modeling.detr.criterion import mean_box_count

    found = [mean_box_count(comm.get_rank() + 1, "cpu").item(), mean_box_count(0, "cpu").item()]
    (folder / f"{comm.get_rank()}.txt").write_text(repr(found))


def test_box_count_is_the_mean_over_processes(tmp_path):
    launch(count_boxes, 2, args=(tmp_path,), use_cuda=False)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["[1.5, 1.0]"] * 2
