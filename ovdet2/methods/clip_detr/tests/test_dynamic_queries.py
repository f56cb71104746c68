"""Dynamic queries: contents, places and masks against references in float64, and who can see whom in a decoder."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.errors import UsageError
from ovdet2.methods.clip_detr.dynamic_queries import (
    BoxEncoder,
    DynamicQueries,
    DynamicSets,
    hidden_from,
    noisy_content,
    padded_sets,
    set_members,
)
from ovdet2.methods.clip_detr.part import dynamic_losses
from ovdet2.modeling.detr.criterion import SetCriterion
from ovdet2.modeling.detr.extra_queries import attention_mask, joined_queries
from ovdet2.modeling.detr.matcher import HungarianMatcher
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.position_encoding import level_masks
from tests import detr_cases
from tests.micro_detr import QUERIES, SIZES, small_transformer

BETAS = (0.0, 0.3, 1.0)
SHAPES = ((8, 12), (4, 6), (2, 3), (1, 2))


def test_content_equals_the_reference():
    generator = torch.Generator().manual_seed(0)
    attributes = 40 * torch.randn(4, 6, generator=generator, dtype=torch.float64) + 3
    noise = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
    found = noisy_content(attributes, noise, torch.tensor(BETAS, dtype=torch.float64))
    for i, row in enumerate(attributes.numpy()):
        known = (row - row.mean()) / np.sqrt(row.var() + 1e-5)
        for s, beta in enumerate(BETAS):
            wanted = np.sqrt(beta) * noise[i, s].numpy() + np.sqrt(1 - beta) * known
            np.testing.assert_allclose(found[i, s].numpy(), wanted, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=3), sets=st.integers(1, 3), conventional=st.integers(1, 3)
)
def test_mask_and_members_equal_the_reference(counts, sets, conventional):
    largest = max(counts)
    hidden = hidden_from(conventional, sets, tuple(counts))
    assert hidden.shape == (len(counts), conventional + sets * largest, conventional + sets * largest)

    def role(place):
        """(set, member), or None for a conventional query."""
        return None if place < conventional else divmod(place - conventional, largest)

    for image, count in enumerate(counts):
        for row, column in np.ndindex(*hidden.shape[1:]):
            of_row, of_column = role(row), role(column)
            sees = of_column is None or (
                of_row is not None and of_row[0] == of_column[0] and of_column[1] < count
            )  # fmt: skip
            assert hidden[image, row, column] == (not sees)
        assert not hidden[image].all(dim=1).any()  # attention over nothing is not a number
    rows = 100 + torch.arange(sum(counts))
    matches = set_members(tuple(counts), sets, rows)
    starts = np.cumsum([0, *counts])
    wanted = [
        (image, s * largest + member, 100 + starts[image] + member)
        for s in range(sets) for image, count in enumerate(counts) for member in range(count)
    ]  # fmt: skip
    assert list(zip(*(part.tolist() for part in (matches.image, matches.query, matches.target)))) == wanted
    values = torch.arange(sum(counts) * sets).view(-1, sets, 1) + 1.0
    padded = padded_sets(values, tuple(counts))
    assert padded.shape == (len(counts), sets * largest, 1) and torch.count_nonzero(padded) == values.numel()
    expected = values.transpose(0, 1).flatten()
    assert torch.equal(padded[matches.image, matches.query, 0], expected)


def decoder(variant="plus_plus", counts=(3, 1), seed=0):
    """(transformer, memory, conventional queries, targets, attributes) in float64, the second image padded."""
    torch.manual_seed(seed)
    transformer = small_transformer(variant).double().eval()
    for head in transformer.decoder.box_heads:  # which begin by changing nothing
        torch.nn.init.normal_(head.layers[-1].weight, std=0.1)
    features = [torch.randn(len(counts), SIZES["dim"], *shape, dtype=torch.float64) for shape in SHAPES]
    masks = level_masks([(64, 96), (48, 64)][: len(counts)], (64, 96), SHAPES)
    memory = transformer.encode(features, masks)
    targets = detr_cases.targets(counts)
    attributes = torch.randn(sum(counts), SIZES["dim"], dtype=torch.float64)
    return transformer, memory, transformer.queries(memory), targets, attributes


def decoded_together(transformer, queries, sets):
    """(queries, mask) of one decoding of conventional and dynamic queries."""
    return (
        joined_queries(queries, [sets.extra], transformer),
        attention_mask(queries.content.shape[1], [sets.extra.hidden]),
    )


def dynamic_outputs(transformer, memory, queries, sets, classify):
    """Outputs of the dynamic queries."""
    found = transformer.decode(memory, *decoded_together(transformer, queries, sets))
    return DetrOutputs(classify(found.hidden), found.boxes_cxcywh, found.hidden).take(slice(QUERIES, None))


def sets_of(maker, transformer, queries, targets, attributes):
    return maker(queries, targets, attributes, transformer.query_maker.encode_position, transformer.heads)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plus_plus", "two_stage", "refine", "one_stage"])
def test_what_sees_what(variant):
    """Nothing in a dynamic set changes a conventional output or another set; its padding changes nothing at all."""
    transformer, memory, queries, targets, attributes = decoder(variant)
    encoder = BoxEncoder(SIZES["dim"]).double() if variant in ("refine", "one_stage") else None
    maker = DynamicQueries(BETAS, box_encoder=encoder)
    sets = sets_of(maker, transformer, queries, targets, attributes)
    assert sets.extra.queries.content.shape[1] == 9 and sets.extra.queries.encoder_outputs is None
    assert sets.extra.queries.references.shape[2] == queries.references.shape[2]
    joined, mask = decoded_together(transformer, queries, sets)
    assert joined.content.shape[1] == QUERIES + 9 and joined.encoder_outputs is queries.encoder_outputs

    def decode(queries, hidden=None):
        outputs = transformer.decode(memory, queries, hidden)
        return torch.cat([outputs.hidden, outputs.boxes_cxcywh], dim=-1)

    alone, whole = decode(queries), decode(joined, mask)
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(whole[:, :, :QUERIES], alone, atol=1e-10, rtol=0)
    assert not torch.allclose(whole, decode(joined))  # without the mask the sets are seen

    def changed_by(image, place):
        """Which queries of which image another content, position and reference of one query changes."""
        parts = {}
        for name in ("content", "position", "references"):
            value = getattr(joined, name).clone()
            value[image, place] = 1 - 0.5 * value[image, place]
            parts[name] = value
        other = decode(replace(joined, **parts), mask)
        return {tuple(at) for at in torch.nonzero((other != whole).any(dim=(0, 3))).tolist()}

    second = set(range(QUERIES + 3, QUERIES + 6))
    assert changed_by(0, QUERIES + 4) == {(0, place) for place in second}
    assert changed_by(1, QUERIES + 3) == {(1, QUERIES + 3)} | {(1, place) for place in second}
    assert changed_by(1, QUERIES + 4) == {(1, QUERIES + 4)}  # padding: image 1 has one object
    everyone = {(0, place) for place in range(QUERIES + 9)}
    assert changed_by(0, 2) == everyone


@torch.no_grad()
def test_positions_are_the_detectors_own_and_noise_is_drawn():
    transformer, _, queries, targets, attributes = decoder()
    maker = DynamicQueries((0.0, 0.0, 0.5), rho=0.5)
    torch.manual_seed(3)
    sets = sets_of(maker, transformer, queries, targets, attributes)
    torch.manual_seed(3)
    again = sets_of(maker, transformer, queries, targets, attributes)
    made, again = sets.extra.queries, again.extra.queries
    assert torch.equal(made.content, again.content) and torch.equal(made.references, again.references)
    references = made.references
    expected = transformer.query_maker.encode_position(references)
    torch.testing.assert_close(made.position, expected)
    first, second, third = made.content[0].split(3)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, third) and not torch.allclose(references[:, :3], references[:, 3:6])
    image, query, target = sets.matches.image, sets.matches.query, sets.matches.target
    away = (references[image, query] - targets.boxes_cxcywh[target]).abs()
    sides = targets.boxes_cxcywh[target, 2:]
    assert (away[:, :2] <= 0.25 * sides + 1e-6).all() and (away[:, 2:] <= 0.5 * sides + 1e-6).all()


def focal(logits, label):
    p = 1 / (1 + np.exp(-logits))
    loss = -0.75 * p**2 * np.log(1 - p)
    loss[label] = -0.25 * (1 - p[label]) ** 2 * np.log(p[label])
    return loss.sum()


def giou_loss(one, other):
    (x0, y0, x1, y1), (u0, v0, u1, v1) = ((x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h in (one, other))
    inner = max(0, min(x1, u1) - max(x0, u0)) * max(0, min(y1, v1) - max(y0, v0))
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - inner
    hull = (max(x1, u1) - min(x0, u0)) * (max(y1, v1) - min(y0, v0))
    return 1 - inner / union + (hull - union) / hull


@pytest.mark.parametrize("auxiliary", [True, False])
def test_losses_equal_the_reference(auxiliary):
    """Of sets of unequal size: outputs of padding do not count."""
    counts, sets, layers = (3, 1, 0), 2, 2
    targets = detr_cases.targets(counts)
    outputs = detr_cases.outputs(layers, 3, sets * 3, dtype=torch.float64)
    made = DynamicSets(None, set_members(counts, sets, torch.arange(4)), sets, 4)
    found = dynamic_losses(outputs, targets, made, SetCriterion(HungarianMatcher(), auxiliary=auxiliary))
    names = ["", "_0"] if auxiliary else [""]
    assert set(found) == {f"loss_{kind}_dynamic{place}" for kind in ("class", "l1", "giou") for place in names}
    for place in names:
        layer = 0 if place else 1
        totals, start = np.zeros(3), 0
        for image, count in enumerate(counts):
            for s, member in np.ndindex(sets, count):
                logits = outputs.pred_logits[layer, image, s * 3 + member].numpy()
                box = outputs.pred_boxes[layer, image, s * 3 + member].numpy()
                wanted = targets.boxes_cxcywh[start + member].double().numpy()
                label = int(targets.labels[start + member])
                totals += [focal(logits, label), np.abs(box - wanted).sum(), giou_loss(box, wanted)]
            start += count
        for kind, total in zip(("class", "l1", "giou"), totals):
            assert found[f"loss_{kind}_dynamic{place}"].item() == pytest.approx(total / (sets * 4), rel=1e-6)


@torch.no_grad()
def test_padding_does_not_change_the_loss():
    """A batch of 3 and 1 objects has the mean loss of its images alone; nothing is drawn."""
    transformer, memory, _, targets, attributes = decoder(counts=(3, 1))
    maker, criterion = DynamicQueries((0.0, 0.0), rho=0.0), SetCriterion(HungarianMatcher())
    readout = torch.randn(SIZES["dim"], 5, dtype=torch.float64)

    def losses(memory, targets, attributes):
        queries = transformer.queries(memory)
        sets = sets_of(maker, transformer, queries, targets, attributes)
        outputs = dynamic_outputs(transformer, memory, queries, sets, lambda hidden: hidden @ readout)
        return dynamic_losses(outputs, targets, sets, criterion)

    batch, singles, start = losses(memory, targets, attributes), [], 0
    for image, count in enumerate(targets.counts):
        part = slice(start, start + count)
        own = replace(targets, labels=targets.labels[part], boxes_cxcywh=targets.boxes_cxcywh[part], counts=(count,))
        tokens, padding, ratios = (
            getattr(memory, name)[image : image + 1] for name in ("tokens", "padding_mask", "valid_ratios")
        )
        of_image = losses(type(memory)(tokens, memory.spatial_shapes, padding, ratios), own, attributes[part])
        singles.append({name: count * value for name, value in of_image.items()})
        start += count
    for name, value in batch.items():
        assert value.item() == pytest.approx(sum(single[name] for single in singles).item() / 4, rel=1e-9), name


@torch.no_grad()
def test_most_objects_of_an_image(caplog):
    transformer, _, queries, targets, attributes = decoder(counts=(5, 2))
    maker, chosen = DynamicQueries((0.0,), rho=0.0, max_objects=3), set()
    for seed in range(12):
        torch.manual_seed(seed)
        with caplog.at_level(logging.INFO, logger="ovdet2"):
            sets = sets_of(maker, transformer, queries, targets, attributes)
        assert sets.objects == 5 and sets.extra.queries.content.shape[1] == 3
        rows = sets.matches.target[sets.matches.image == 0].tolist()
        assert len(set(rows)) == 3 and sets.matches.target[sets.matches.image == 1].tolist() == [5, 6]
        chosen |= set(rows)
        references = sets.extra.queries.references[sets.matches.image, sets.matches.query]
        torch.testing.assert_close(references, targets.boxes_cxcywh[sets.matches.target].double())
    assert chosen == set(range(5))
    assert "0.jpg (id 10): dynamic queries of 3 of its 5 objects" in caplog.text and "1.jpg" not in caplog.text


@pytest.mark.parametrize("counts", [(0, 0), (1, 0)])
def test_no_object_and_one(counts):
    """Every parameter that takes part has a gradient: several processes wait for it."""
    transformer, memory, queries, targets, _ = decoder(counts=counts)
    attributes = torch.randn(sum(counts), SIZES["dim"], dtype=torch.float64, requires_grad=True)
    sets = sets_of(DynamicQueries(BETAS), transformer, queries, targets, attributes)
    outputs = dynamic_outputs(transformer, memory, queries, sets, lambda hidden: hidden[..., :5])
    losses = dynamic_losses(outputs, targets, sets, SetCriterion(HungarianMatcher()))
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) and (value > 0) == (sum(counts) > 0) for value in losses.values())
    assert attributes.grad is not None and torch.isfinite(attributes.grad).all()
    assert transformer.query_maker.box_embed.weight.grad is not None


@pytest.mark.parametrize("options", [{"betas": ()}, {"betas": (1.2,)}, {"rho": -0.1}, {"max_objects": 0}])
def test_settings_that_make_no_sense(options):
    with pytest.raises(UsageError, match="MODEL.CLIP_DETR"):
        DynamicQueries(**options)
