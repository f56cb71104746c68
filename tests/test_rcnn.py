"""OpenVocabularyRCNN: losses against float64, properties, leak, golden micro-model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from safetensors.torch import save_file

from ovdet2.errors import NumericalError
from ovdet2.layers import fuse_scores
from ovdet2.modeling.rcnn.output_layers import SECONDARY_USES
from tests import micro

GOLDEN = Path(__file__).parent / "golden" / "vild_text.safetensors"


def losses(network, records):
    network.train()
    torch.manual_seed(0)  # Detectron2 shuffles what it samples, even when it samples all
    with EventStorage():
        return network(records)


def test_classification_loss_equals_float64_reference():
    """Mean over sampled regions of softmax cross-entropy over base + background (ViLD Eq. 2)."""
    predictor = micro.model().train().roi_heads.box_predictor
    features = micro.wave((9, 32), 0.21)
    labels = torch.tensor([0, 1, 2, 3, 3, 3, 2, 1, 3])  # 3 is background: B = 3
    proposals = Instances((64, 96))
    proposals.proposal_boxes = Boxes(torch.tensor([[1.0, 1.0, 20.0, 20.0]]).repeat(9, 1))
    proposals.gt_boxes = Boxes(torch.tensor([[2.0, 3.0, 25.0, 22.0]]).repeat(9, 1))
    proposals.gt_classes = labels
    with EventStorage():
        found = predictor.losses(predictor(features), [proposals])
    layer = predictor.cls_score
    region = features.double().numpy() @ layer.projection.weight.detach().double().numpy().T
    region = region + layer.projection.bias.detach().double().numpy()
    background = layer.background.detach().double().numpy()
    columns = np.concatenate([micro.vocabulary().embeddings[:3].double().numpy(), background[None]])
    columns = columns / np.linalg.norm(columns, axis=1, keepdims=True)
    cosine = (region / np.linalg.norm(region, axis=1, keepdims=True)) @ columns.T
    expected = np.mean(
        [np.log(np.exp((row - row[label]) / micro.TEMPERATURE).sum()) for row, label in zip(cosine, labels)]
    )
    assert found["loss_cls"].item() == pytest.approx(expected, rel=1e-4)
    deltas = predictor(features)[1].detach().double()
    target = predictor.box2box_transform.get_deltas(proposals.proposal_boxes.tensor, proposals.gt_boxes.tensor).double()
    foreground = labels < 3
    error = (deltas - target).abs()[foreground]
    huber = torch.where(error < 1, 0.5 * error**2, error - 0.5)  # delta 1
    assert found["loss_box_reg"].item() == pytest.approx(huber.sum().item() / 9, rel=1e-4)
    assert (error < 1).any() and (error > 1).any()


def test_boxes_are_pooled_exactly_under_autocast():
    """At 900 px the step of bfloat16 is 4 px, that of the cells of these boxes 2."""
    heads, seen = micro.model().train().roi_heads, []
    heads.box_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ramp = torch.linspace(0, 1, 256).expand(1, 16, 16, 256)  # of an image of 1024 px, so x can be read off it
    boxes = Instances((64, 1024))
    boxes.proposal_boxes = boxes.gt_boxes = Boxes(torch.tensor([[901.0, 8.0, 915.0, 40.0], [5.0, 8.0, 19.0, 40.0]]))
    boxes.gt_classes = torch.tensor([0, 1])
    boxes.objectness_logits = torch.ones(2)
    features = {name: ramp for name in heads.box_in_features}
    for kind in (torch.bfloat16, torch.float32):
        of_type = {name: level.to(torch.bfloat16).to(kind) for name, level in features.items()}
        torch.manual_seed(0)
        with EventStorage(), torch.autocast("cpu", torch.bfloat16):
            heads(None, of_type, [boxes], [boxes])
    assert torch.equal(seen[0].float(), seen[1].float())


def test_loss_does_not_depend_on_the_order_of_images_or_objects():
    network, records = micro.model(), micro.images(2)
    straight = losses(network, records)
    for record in records:
        record["instances"] = record["instances"][torch.tensor([1, 0])]
    swapped = losses(network, records[::-1])
    for name in straight:
        assert straight[name].item() == pytest.approx(swapped[name].item(), rel=1e-4), name


def test_image_without_objects_trains():
    network, records = micro.model(), micro.images(1)
    records[0]["instances"] = records[0]["instances"][:0]
    found = losses(network, records)
    assert found["loss_box_reg"].item() == 0 and all(torch.isfinite(v) for v in found.values())
    sum(found.values()).backward()


def test_every_parameter_gets_a_gradient_and_buffers_stay():
    network = micro.model()
    before = network.vocabulary.embeddings.clone()
    sum(losses(network, micro.images(2)).values()).backward()
    missing = [
        n for n, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    # p6 has no parameters; lateral and output convolutions of unused levels do not exist in this pyramid.
    assert not missing, missing
    assert torch.equal(before, network.vocabulary.embeddings)


def test_novel_embeddings_cannot_reach_the_loss():
    records = micro.images(2)
    words = micro.vocabulary()
    words.embeddings[3:] = words.embeddings[3:].flip(0) * -1
    for name, value in losses(micro.model(), records).items():
        assert torch.equal(value, losses(micro.model(words), records)[name]), name


def test_batch_equals_singles():
    """Of one size: Detectron2 pads smaller images, and convolutions see the padding."""
    network, records = micro.model(), micro.images(3)[::2]
    with torch.no_grad():
        together = network(records)
        for record, both in zip(records, together):
            alone = network([record])[0]
            assert alone["instances"].scores.shape == both["instances"].scores.shape
            assert torch.allclose(alone["instances"].scores, both["instances"].scores, atol=1e-4)
            assert torch.allclose(alone["instances"].pred_boxes.tensor, both["instances"].pred_boxes.tensor, atol=1e-2)


def test_permuting_the_vocabulary_permutes_the_detections():
    network, record = micro.model(), micro.images(1)
    order = torch.tensor([2, 0, 4, 1, 3])
    with torch.no_grad():
        straight = network(record)[0]["instances"]
        words = micro.vocabulary(num_base=0)
        network.vocabulary.set(
            micro.Vocabulary(
                [words.names[i] for i in order], words.base_mask, words.embeddings[order], words.teacher, "single"
            )
        )
        permuted = network(record)[0]["instances"]
    assert torch.allclose(straight.scores, permuted.scores, atol=1e-6)
    assert torch.equal(straight.pred_classes, order[permuted.pred_classes])


@pytest.mark.parametrize("k", [1, 3, 1203])
def test_any_number_of_words(k):
    network = micro.model()
    network.vocabulary.set(micro.vocabulary([f"word {i}" for i in range(k)], 0))
    with torch.no_grad():
        found = network(micro.images(1))[0]["instances"]
    assert len(found) <= 100 and (found.pred_classes < k).all() and len(found) > 0


@pytest.mark.parametrize("k", [1, 2])
def test_training_on_few_words(k):
    """K = 1 trains: one base word against the background; its novel neighbour changes nothing."""
    records = micro.images(1)
    records[0]["instances"].gt_classes[:] = 0
    network = micro.model(micro.vocabulary(micro.NAMES[:k], num_base=1))
    found = losses(network, records)
    sum(found.values()).backward()
    alone = losses(micro.model(micro.vocabulary(micro.NAMES[:1], num_base=1)), records)
    assert all(torch.isfinite(value) for value in found.values())
    assert network.roi_heads.num_classes == 1
    assert torch.allclose(found["loss_rpn_cls"], alone["loss_rpn_cls"])


def test_a_diverged_model_is_an_error_and_not_a_low_ap():
    network = micro.model()
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.projection.bias.fill_(float("nan"))
        with pytest.raises(NumericalError, match="not finite"):
            network(micro.images(1))


def test_proposals_come_back_in_original_pixels():
    network, records = micro.model(), micro.images(1)
    with torch.no_grad():
        plain = network(records)[0]["proposals"]
        records[0].update(height=128, width=288)  # twice as high, three times as wide
        scaled = network(records)[0]["proposals"]
    assert len(plain) == 20 and scaled.image_size == (128, 288)
    assert torch.allclose(
        scaled.proposal_boxes.tensor, plain.proposal_boxes.tensor * torch.tensor([3.0, 2.0, 3.0, 2.0])
    )


@pytest.mark.parametrize("mode", SECONDARY_USES)
def test_secondary_scores_are_used_as_their_mode_says(mode):
    network = micro.model()
    predictor = network.roi_heads.box_predictor
    predictor.secondary_use = mode
    proposals = Instances((64, 96))
    proposals.objectness_logits = torch.tensor([0.3, -1.0])
    proposals.secondary_probs = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.25], [0.6, 0.1, 0.1, 0.1, 0.1]])
    proposals.proposal_boxes = Boxes(torch.tensor([[1.0, 1.0, 20.0, 20.0], [5.0, 5.0, 30.0, 30.0]]))
    logits = micro.wave((2, 6), 0.4)
    (probs,) = predictor.predict_probs((logits, None), [proposals])
    own = logits.softmax(1)
    expected = {
        "only": proposals.secondary_probs,
        "only_objectness": (proposals.secondary_probs * proposals.objectness_logits.sigmoid()[:, None]).sqrt(),
        "fuse": fuse_scores(own, proposals.secondary_probs, torch.tensor([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 3]))[:, :5],
    }[mode]
    assert torch.allclose(probs[:, :5], expected, atol=1e-6) and torch.allclose(probs[:, 5], own[:, 5])


def golden_tensors():
    """See :func:`tests.micro.golden_rcnn`."""
    return micro.golden_rcnn(micro.model(), losses)


def test_golden():
    """Tolerances: 1e-3 relative (gradients 1e-2), for the order of sums differs between machines.

    Rewrite: python -m tests.test_rcnn.
    """
    micro.assert_golden(GOLDEN, golden_tensors(), gradient_atol=1e-3)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(golden_tensors(), str(GOLDEN))
