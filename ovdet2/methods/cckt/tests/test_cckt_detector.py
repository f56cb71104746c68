"""The detector with CCKT-Det's additions, by configuration: what goes in and what comes out, and a golden model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import UsageError
from ovdet2.methods.cckt.semantic_priors import CarriedWords
from ovdet2.methods.cckt.tests.cckt_cases import model, samples
from ovdet2.vocabulary import Vocabulary
from tests import micro
from tests.test_detr_build import model_of

GOLDEN = Path(__file__).parent / "golden.safetensors"
OPTION = {
    "full": [],
    "priors": ["MODEL.CCKT.CONTRAST", "none", "MODEL.CCKT.SCORE", "class"],
    "contrast": ["MODEL.CCKT.PRIORS", "False"],
    "similarity": ["MODEL.CCKT.CLASS_LOSS_ON", "similarity"],
    "both": ["MODEL.CCKT.CLASS_LOSS_ON", "both", "MODEL.CCKT.CONTRAST", "class", "MODEL.CCKT.SCORE", "product"],
    "batch": ["MODEL.CCKT.CONTRAST", "batch", "MODEL.DETR.VARIANT", "one_stage"],
    "interleaved": ["MODEL.DETR.VARIANT", "plus_plus"],
}


@pytest.mark.parametrize("name", OPTION)
@pytest.mark.parametrize("objects", [(2, 2), (1, 0), (0, 0)])
def test_losses_and_gradients(name, objects):
    """Also of images whose objects were all cropped away: every trained parameter has a gradient, as several processes
    need it."""
    detector = model(*OPTION[name], "MODEL.BACKBONE.FREEZE_AT", "0")
    losses = detector(samples(words=((2, 1), (0,)) if objects[0] else ((), ()), objects=objects))
    kinds = {"loss_class", "loss_l1", "loss_giou"}
    kinds |= set() if name == "priors" else {"loss_contrast"}
    kinds |= {"loss_similarity"} if name == "both" else set()
    places = ["", "_0"]
    expected = {f"{kind}{place}" for kind in kinds for place in places}
    if name == "interleaved":
        expected |= {f"loss_{kind}_encoder" for kind in ("class", "l1", "giou")}
    assert set(losses) == expected and all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
    frozen = any(not p.requires_grad for p in detector.network.class_branches.parameters())
    assert frozen == (name == "similarity")


@torch.no_grad()
def test_off_it_is_the_plain_text_detector():
    """Table 4, row 1: with every part off, the same weights and the same numbers."""
    plain = model_of("MODEL.DETR.DROPOUT", "0.0")
    off = model("MODEL.CCKT.PRIORS", "False", "MODEL.CCKT.CONTRAST", "none", "MODEL.CCKT.SCORE", "class")
    assert set(off.state_dict()) == set(plain.state_dict())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(off.parameters(), plain.parameters()))
    mine, theirs = off(samples()), plain(micro.images())
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for ours, found in zip(off.eval()(samples()), plain.eval()(micro.images())):
        assert torch.equal(ours["instances"].scores, found["instances"].scores)
        assert not ours["instances"].has("prior_words")


@torch.no_grad()
@pytest.mark.parametrize("variant", ["refine", "plus_plus"])
def test_order_of_the_vocabulary_permutes_the_outputs(variant):
    order = [3, 0, 4, 1, 2]
    words = micro.vocabulary()
    moved = Vocabulary(
        tuple(words.names[i] for i in order), words.base_mask[order], words.embeddings[order], words.teacher,
        words.templates, tuple(words.category_ids[i] for i in order),
    )  # fmt: skip
    for score in ("class", "similarity", "product"):
        detector = model("MODEL.DETR.VARIANT", variant, "MODEL.CCKT.SCORE", score).eval()
        _, before, queries = detector.infer(samples(words=((4, 1, 2), (0,))))
        detector.vocabulary.set(moved)
        places = [tuple(order.index(word) for word in list_) for list_ in ((4, 1, 2), (0,))]
        _, after, queries = detector.infer(samples(words=places))
        assert torch.equal(after.pred_boxes, before.pred_boxes)
        assert torch.allclose(after.pred_logits, before.pred_logits[..., order], atol=1e-5)


@torch.no_grad()
def test_a_word_absent_from_the_priors_changes_no_box():
    detector = model().eval()
    _, before, carried = detector.infer(samples())
    words = micro.vocabulary(names=(*micro.NAMES, "striped heart"))
    words.embeddings[:5] = micro.vocabulary().embeddings
    detector.vocabulary.set(words)
    _, after, queries = detector.infer(samples())
    assert torch.equal(after.pred_boxes, before.pred_boxes)
    assert torch.allclose(after.pred_logits[..., :5], before.pred_logits, atol=1e-5)
    assert torch.equal(queries.attached(CarriedWords).words, carried.attached(CarriedWords).words)


@torch.no_grad()
def test_priors_change_boxes_and_every_detection_has_its_word():
    detector = model().eval()
    [first, second] = detector(samples())
    assert set(first["instances"].prior_words.tolist()) <= {4, 1} and set(second["instances"].prior_words.tolist()) == {
        0
    }
    _, outputs, queries = detector.infer(samples())
    found = first["instances"]
    assert torch.equal(found.prior_words, queries.attached(CarriedWords).words[0][found.queries])
    [without, _] = detector(samples(words=((), (0,))))
    assert set(without["instances"].prior_words.tolist()) == {-1}
    assert not torch.equal(without["instances"].pred_boxes.tensor, found.pred_boxes.tensor)


@torch.no_grad()
def test_batch_equals_singles():
    """Images of one size: convolutions see the padding of another."""
    detector, made = model().eval(), samples(3, words=((4, 1, 0), (1,), ()))[::2]
    for output, record in zip(detector(made), made):
        [single] = detector([record])
        assert torch.allclose(single["instances"].scores, output["instances"].scores, atol=1e-4)
        assert torch.equal(single["instances"].prior_words, output["instances"].prior_words)


@torch.no_grad()
def test_every_decoder_layer_by_its_head():
    detector = model("TEST.DECODER_LAYERS", "True").eval()
    [output] = detector(samples(1))
    _, outputs, queries = detector.infer(samples(1), all_layers=True)
    assert outputs.layers == 2 and len(output["decoder_layers"]) == 1
    top = output["decoder_layers"][0].scores[0]
    assert torch.isclose(top, outputs.pred_logits[0].sigmoid().max())


def test_mixed_precision():
    detector = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detector(samples(words=((2, 1), (0,))))
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in losses.values())


def test_checkpoint_holds_one_vocabulary_and_takes_other_words(tmp_path):
    detector = model()
    AtomicCheckpointer(detector, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert [name for name in saved if name.endswith("embeddings")] == ["vocabulary.embeddings"]
    other = model(words=micro.vocabulary(names=("star", "moon"), num_base=2)).eval()
    AtomicCheckpointer(other).load_all(str(tmp_path / "model.pth"))
    assert torch.equal(other.cckt.priors.projection.weight, detector.cckt.priors.projection.weight)
    [output] = other(samples(1, words=((1,),)))
    assert output["instances"].pred_classes.max() == 1


def test_rows_3_and_5_share_weights(tmp_path):
    detector = model()
    AtomicCheckpointer(detector, str(tmp_path)).save("model")
    other = model("MODEL.CCKT.SCORE", "class")
    AtomicCheckpointer(other).load_all(str(tmp_path / "model.pth"))


def test_clip_detr_on_it_leaves_its_losses():
    """Dynamic queries carry no word, have no embedding and take no part in the contrast."""
    plain = model("MODEL.DETR.VARIANT", "plus_plus")
    parts = ["MODEL.CLIP_DETR.ALIGN_WEIGHT", "1.0", "MODEL.CLIP_DETR.DYNAMIC_WEIGHT", "1.0"]
    both = model("MODEL.DETR.VARIANT", "plus_plus", *parts)
    assert both.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    batch = samples(words=((2, 1), (0,)))
    with torch.no_grad():
        alone = plain(batch)
    losses = both(batch)
    assert "loss_contrast" in alone and {"loss_align", "loss_class_dynamic"} <= set(losses) - set(alone)
    for name, value in alone.items():
        assert losses[name].item() == pytest.approx(value.item(), rel=1e-4), name
    sum(losses.values()).backward()
    assert [name for name, p in both.named_parameters() if p.requires_grad and p.grad is None] == []


def test_words_of_another_vocabulary():
    with pytest.raises(UsageError, match="present words .* of 0.jpg"):
        model()(samples(words=((4, 1), (0,))))  # word 4 is novel
    with pytest.raises(UsageError, match="has no present words attached"):
        model()(micro.images())


@torch.no_grad()
def test_the_temperature_of_the_contrast_changes_nothing_else():
    """Nor does stating the defaults; a norm divides the temperature."""

    def losses(*overrides):
        detector = model(*overrides)
        assert detector.cckt.temperature == 0.07
        return detector.cckt.contrast_temperature, detector(samples(words=((2, 1), (0,))))

    default, plain = losses()
    assert default == 0.07
    for overrides, temperature in (
        (("MODEL.CCKT.CONTRAST_TEMPERATURE", "0.07", "MODEL.CCKT.CONTRAST_NORM", "1.0"), 0.07),
        (("MODEL.CCKT.CONTRAST_TEMPERATURE", "0.38"), 0.38),
        (("MODEL.CCKT.CONTRAST_NORM", "20.0"), 0.0035),
    ):
        found, other = losses(*overrides)
        assert found == pytest.approx(temperature, rel=1e-12)
        equal = {name for name, value in other.items() if torch.equal(value, plain[name])}
        changed = set() if temperature == 0.07 else {"loss_contrast", "loss_contrast_0"}
        assert set(other) - equal == changed


@pytest.mark.parametrize("overrides", [("CONTRAST_TEMPERATURE", "-0.1"), ("CONTRAST_NORM", "0.0")])
def test_a_contrast_out_of_range(overrides):
    with pytest.raises(UsageError, match="MODEL.CCKT.CONTRAST_TEMPERATURE is .* and CONTRAST_NORM"):
        model(f"MODEL.CCKT.{overrides[0]}", overrides[1])


def golden():
    """Losses, some gradients, and outputs at test of a model whose weights no random generator made."""
    detector = model("MODEL.DETR.VARIANT", "plus_plus")
    with torch.no_grad():
        for number, parameter in enumerate(detector.parameters()):
            if parameter.ndim > 1:
                parameter.copy_(micro.wave(parameter.shape, 0.3 + 0.01 * number) * (1.5 / parameter[0].numel() ** 0.5))
    losses = detector(samples(words=((2, 1), (0,))))
    sum(losses.values()).backward()
    found = {name: value.detach() for name, value in losses.items()}
    for name in ("cckt.priors.projection.weight", "cckt.heads.1.weight"):
        found[f"gradient.{name}"] = detector.get_parameter(name).grad.clone()
    with torch.no_grad():
        _, outputs, queries = detector.eval().infer(samples())
    return found | {"pred_logits": outputs.pred_logits.clone(), "pred_boxes": outputs.pred_boxes.clone()}


def test_golden():
    found = golden()
    scale = max(value.abs().max().item() for name, value in found.items() if "gradient" in name)
    micro.assert_golden(GOLDEN, found, gradient_atol=1e-3 * scale)


if __name__ == "__main__":
    save_file(golden(), str(GOLDEN))
