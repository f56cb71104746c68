"""The protocol of parts on the DETR host: altered queries, extra queries, losses, costs, weak images, scores."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch

from ovdet2.data.samples import CAPTIONS, IMAGE_LABELS, Sample, as_samples
from ovdet2.errors import UsageError
from ovdet2.modeling.detr.build import build_criterion, build_detr, build_postprocessor, loss_weights
from ovdet2.modeling.detr.extra_queries import attention_mask
from ovdet2.modeling.detr.memory import Queries
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.part import DetrPart, ExtraQueries, Prepared
from ovdet2.modeling.meta_arch.open_vocabulary_deformable_detr import OpenVocabularyDeformableDETR
from ovdet2.vocabulary.bank import WordBank
from tests import micro
from tests.test_detr_build import small_cfg

LENGTH = 32  # channels


@dataclass(frozen=True)
class Mark:
    """An attachment of queries."""

    value: float


class Extra(DetrPart):
    """A number of further queries of each image, around its centre; their loss is a mean over their outputs."""

    def __init__(self, count, frequency, name):
        super().__init__({f"loss_{name}": 2.0})
        self.name, self.count = name, count
        self.content = torch.nn.Parameter(micro.wave((count, LENGTH), frequency))
        self.boxes = 0.5 + 0.2 * micro.wave((count, 4), frequency + 0.1)
        self.seen = None

    def before_decoding(self, step):
        images, conventional = step.queries.content.shape[:2]
        content = self.content.expand(images, -1, -1)
        queries = Queries(content, None, self.boxes.expand(images, -1, -1))
        rows = images * step.network.transformer.heads
        return Prepared(extra=ExtraQueries(queries, torch.zeros(rows, self.count, conventional + self.count).bool()))

    def losses_before_matching(self, step, prepared, extra_outputs):
        self.seen = extra_outputs
        values = extra_outputs.hidden.square().mean() + extra_outputs.pred_boxes.mean()
        return {f"loss_{self.name}": values + extra_outputs.pred_logits.mean()}


class Altering(DetrPart):
    """Adds a number to the content of the queries and remembers it with them."""

    name = "altering"

    def __init__(self, value):
        super().__init__()
        self.value = value

    def alter_queries(self, queries, samples):
        return replace(queries, content=queries.content + self.value).attach(Mark(self.value))

    def annotate(self, instances, queries, image):
        instances.marks = torch.full((len(instances),), queries.attached(Mark).value)


class Matched(DetrPart):
    """A loss of the last layer's matched queries, a cost, outputs of its own and other scores."""

    name = "matched"

    def alter_outputs(self, outputs):
        return outputs.with_added(energy=outputs.hidden.square().mean(dim=-1))

    def matching_costs(self):
        return [(0.5, lambda outputs, labels: outputs.added["energy"][..., None].expand(*outputs.pred_boxes.shape[:3],
                                                                                        labels.shape[1]))]  # fmt: skip

    def losses(self, step, outputs, matches, num_boxes):
        rows = outputs.added["energy"][-1][matches[-1].image, matches[-1].query]
        return {"loss_energy": rows.sum() / num_boxes, "loss_energy_0": 0 * rows.sum()}

    def score(self, outputs, queries):
        return replace(outputs, pred_logits=-outputs.pred_logits)


class Weak(DetrPart):
    """The mean of the encoded tokens of images without boxes."""

    def __init__(self, name, *sees):
        super().__init__({f"loss_{name}": 0.25})
        self.name, self.sees, self.given = name, sees, []

    def weak_losses(self, samples, memory, network):
        self.given.append((samples, memory))
        return {f"loss_{self.name}": memory.tokens.square().mean()}


def detector(*parts):
    """A two-stage detector without dropout, of one seed."""
    torch.manual_seed(0)
    cfg = small_cfg("MODEL.DETR.VARIANT", "plus_plus", "MODEL.DETR.DROPOUT", "0.0", "MODEL.DETR.DIM", str(LENGTH))
    from detectron2.modeling import build_backbone

    bank = WordBank(micro.vocabulary())
    network = build_detr(cfg, build_backbone(cfg), bank)
    return OpenVocabularyDeformableDETR(
        network=network,
        vocabulary=bank,
        criterion=build_criterion(cfg, [cost for part in parts for cost in part.matching_costs()]),
        postprocessor=build_postprocessor(cfg),
        loss_weights=loss_weights(cfg),
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
        parts=parts,
    )


def first():
    return Extra(3, 0.3, "first")


def second():
    return Extra(5, 0.7, "second")


def same(mine, theirs, rel=1e-4):
    assert {name: value.item() for name, value in mine.items()} == pytest.approx(
        {name: value.item() for name, value in theirs.items()}, rel=rel
    )


class TestExtraQueries:
    @torch.no_grad()
    def test_two_parts_in_one_decoding_give_what_each_gives_alone(self):
        """And the detector's own queries what they give without parts."""
        records = micro.images()
        plain, both = detector()(records), detector(first(), second())(records)
        same({name: both[name] for name in plain}, plain)
        for make, name in ((first, "first"), (second, "second")):
            alone = make()
            losses = detector(alone)(records)
            assert set(losses) == {*plain, f"loss_{name}"}
            assert both[f"loss_{name}"].item() == pytest.approx(losses[f"loss_{name}"].item(), rel=1e-4)

    @torch.no_grad()
    def test_each_part_has_its_own_outputs(self):
        one, other = first(), second()
        detector(one, other)(micro.images())
        alone = second()
        detector(alone)(micro.images())
        assert one.seen.pred_logits.shape == (2, 2, 3, 3) and other.seen.pred_logits.shape == (2, 2, 5, 3)
        for name in ("hidden", "pred_boxes", "pred_logits"):
            torch.testing.assert_close(getattr(other.seen, name), getattr(alone.seen, name), atol=1e-4, rtol=1e-4)
        assert other.seen.encoder is None and [part.shape[1] for part in other.seen.references] == [5, 5]

    @torch.no_grad()
    def test_the_order_of_parts_does_not_matter(self):
        records = micro.images()
        same(detector(first(), second(), Altering(0.1))(records), detector(Altering(0.1), second(), first())(records))

    @torch.no_grad()
    def test_batch_equals_singles(self):
        """For images of one size, of as many objects."""
        model, records = detector(first(), second(), Altering(0.1)), micro.images(3)[::2]
        batch, singles = model(records), [model([record]) for record in records]
        means = {name: sum(single[name] for single in singles) / 2 for name in batch}
        same(batch, means, rel=1e-3)

    def test_gradients_reach_the_extra_queries(self):
        part = first()
        model = detector(part)
        model(micro.images())["loss_first"].backward()
        assert part.content.grad.abs().sum() > 0 and not model.network.class_branches[-1].bias.grad.isnan()

    def test_mask(self):
        """Groups do not see each other, the detector's queries none of them; each sees what its own mask leaves."""
        generator = torch.Generator().manual_seed(0)
        own = [torch.rand(2, count, 4 + count, generator=generator) < 0.5 for count in (2, 3)]
        mask = attention_mask(4, own)
        assert mask.shape == (2, 9, 9) and not mask[:, :4, :4].any() and mask[:, :4, 4:].all()
        for group, place in zip(own, (slice(4, 6), slice(6, 9))):
            assert torch.equal(mask[:, place, :4], group[:, :, :4]) and torch.equal(
                mask[:, place, place], group[:, :, 4:]
            )
        assert mask[:, 4:6, 6:].all() and mask[:, 6:, 4:6].all()


class TestOneThing:
    @torch.no_grad()
    def test_a_part_that_only_alters_queries(self):
        """In training and at test; what it attaches stays with the detector's queries."""
        plain, altered, zero = detector(), detector(Altering(0.5)), detector(Altering(0.0))
        records = micro.images()
        assert set(altered(records)) == set(plain(records))
        assert altered(records)["loss_class"] != plain(records)["loss_class"]
        same(zero(records), plain(records), rel=0)
        [found, _] = altered.eval()(records)
        assert found["instances"].marks.unique().tolist() == [0.5]
        _, outputs, queries = zero.eval().infer(records)
        assert queries.attached(Mark) == Mark(0.0)
        assert torch.equal(outputs.pred_logits, plain.eval().infer(records)[1].pred_logits)

    @torch.no_grad()
    def test_costs_added_outputs_losses_and_scores(self):
        part, extra, records = Matched(), first(), micro.images()
        losses = detector(part, extra)(records)
        assert losses["loss_energy"] > 0 and extra.seen.added["energy"].shape == (2, 2, 3)
        model = detector(part).eval()
        assert torch.equal(model.infer(records)[1].pred_logits, -detector().eval().infer(records)[1].pred_logits)

    @torch.no_grad()
    def test_weights_go_by_kind_and_are_1_unless_named(self):
        part, extra, records = Matched({"loss_energy": 3.0}), first(), micro.images()
        model = detector(part, extra)
        weighted, plain = model(records), model.losses(records)
        assert list(weighted) == list(plain) and list(plain)[-3:] == ["loss_energy", "loss_energy_0", "loss_first"]
        ratios = {"loss_energy": 3.0, "loss_first": 2.0, "loss_l1_0": 5.0}
        for name, ratio in ratios.items():
            assert weighted[name].item() == pytest.approx(ratio * plain[name].item(), rel=1e-5)
        part.loss_weights.clear()
        assert model(records)["loss_energy"].item() == pytest.approx(plain["loss_energy"].item(), rel=1e-5)

    def test_names_that_are_used_twice(self):
        with pytest.raises(UsageError, match="cannot have a part named 'network'"):
            detector(Extra(1, 0.1, "network"))
        with pytest.raises(UsageError, match="cannot have a part named 'first'"):
            detector(first(), first())

        class Same(Extra):
            def __init__(self):
                super().__init__(2, 0.5, "other")
                self.loss_weights = {}

            def losses_before_matching(self, *given):
                return {"loss_first": super().losses_before_matching(*given)[f"loss_{self.name}"]}

        with pytest.raises(UsageError, match="two losses named loss_first"):
            detector(first(), Same())(micro.images())

    def test_weights_are_saved_under_the_name_and_a_copy_has_its_own(self):
        model = detector(first())
        assert [name for name in model.state_dict() if "first" in name] == ["first.content"]
        average = copy.deepcopy(model)
        assert average.parts[0] is average.first and average.first is not model.first


class TestWeakImages:
    def images(self, kinds):
        made = as_samples(micro.images(len(kinds)))
        for sample, kind in zip(made, kinds):
            sample.kind, sample.captions = kind, ("a red star",)
            sample.instances = sample.instances if kind == "boxes" else None
        return made

    @torch.no_grad()
    def test_a_step_of_captioned_images_only(self):
        part = Weak("captions", CAPTIONS)
        model, batch = detector(part, Altering(0.1), first()), self.images([CAPTIONS, CAPTIONS])
        losses = model(batch)
        assert list(losses) == ["loss_captions"] and losses["loss_captions"].isfinite()
        [(samples, memory)] = part.given
        assert samples == batch and len(memory.tokens) == 2
        assert model.losses(batch)["loss_captions"].item() == pytest.approx(4 * losses["loss_captions"].item())

    def test_it_trains_the_encoder(self):
        model = detector(Weak("captions", CAPTIONS))
        model(self.images([CAPTIONS]))["loss_captions"].backward()
        assert model.network.transformer.encoder.layers[0].ffn.linear1.weight.grad.abs().sum() > 0

    @torch.no_grad()
    def test_beside_images_with_boxes_each_part_sees_its_own(self):
        """And the losses of boxes are those of the images with boxes alone."""
        one, two = Weak("captions", CAPTIONS), Weak("both", CAPTIONS, IMAGE_LABELS)
        batch = self.images(["boxes", CAPTIONS, IMAGE_LABELS, "boxes"])
        model = detector(one, two)
        losses, plain = model(batch), detector()([batch[0], batch[3]])
        assert list(losses) == [*plain, "loss_captions", "loss_both"]
        same({name: losses[name] for name in plain}, plain, rel=0)
        [(samples, memory)], [(others, both)] = one.given, two.given
        assert samples == [batch[1]] and others == [batch[1], batch[2]]
        assert torch.equal(memory.tokens, both.tokens[:1]) and torch.equal(memory.padding_mask, both.padding_mask[:1])
        assert torch.equal(memory.levels()[0], both.levels()[0][:1])

    def test_images_that_no_part_reads(self):
        with pytest.raises(UsageError, match="no part of the detector has a loss for images of kind captions"):
            detector(Weak("labels", IMAGE_LABELS))(self.images([CAPTIONS]))


class TestOutputs:
    def outputs(self):
        shape, generator = (3, 2, 6), torch.Generator().manual_seed(0)

        def values(*more):
            return torch.rand(*shape, *more, generator=generator)

        references = tuple(torch.rand(2, 6, 4, generator=generator) for _ in range(3))
        sampling = values(4, 2, 2, 2), values(4, 2, 2)
        return DetrOutputs(
            values(5), values(4), values(8), references, *sampling, added={"one": values(), "two": values(7)}
        )

    def test_cut_by_queries_and_put_together_again(self):
        whole = self.outputs()
        parts = [whole.take(slice(2)), whole.take(slice(2, None))]
        for name in ("pred_logits", "pred_boxes", "hidden", "sampling_locations", "sampling_weights"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=2), getattr(whole, name))
        for name, value in whole.added.items():
            assert torch.equal(torch.cat([part.added[name] for part in parts], dim=2), value)
        for layer, value in enumerate(whole.references):
            assert torch.equal(torch.cat([part.references[layer] for part in parts], dim=1), value)

    def test_last_layer(self):
        whole = self.outputs()
        last = whole.last_layer()
        assert whole.layers == 3 and last.layers == 1 and len(last.references) == 1
        assert torch.equal(last.hidden[0], whole.hidden[2]) and torch.equal(last.added["two"][0], whole.added["two"][2])
        assert torch.equal(last.sampling_weights[0], whole.sampling_weights[2])
        tested = replace(whole, pred_logits=whole.pred_logits[-1:], added={})
        assert tested.layers == 1 and torch.equal(tested.last_layer().pred_logits, tested.pred_logits)

    def test_what_a_one_stage_detector_lacks_stays_so(self):
        plain = replace(self.outputs(), sampling_locations=None, sampling_weights=None)
        assert plain.take(slice(1)).sampling_weights is None and plain.last_layer().sampling_locations is None


@torch.no_grad()
def test_detectron2_records_and_samples_are_taken_alike():
    model, records = detector(), micro.images()
    samples = [Sample.of(record) for record in records]
    same(model(samples), model(records), rel=0)
    for mine, theirs in zip(model.eval()(samples), model(records)):
        assert torch.equal(mine["instances"].scores, theirs["instances"].scores)
