"""The Deformable DETR graph: parity with ``transformers``, padding, masks, permutations, gradients."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.decoder import refine_boxes
from ovdet2.modeling.detr.heads import ClosedSetBranch, TextBranch, inverse_sigmoid
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.neck import MultiScaleNeck
from ovdet2.modeling.detr.position_encoding import level_masks, sine_position
from ovdet2.modeling.detr.transformer import VARIANTS, DeformableTransformer
from ovdet2.vocabulary.bank import WordBank
from tests import micro
from tests.micro_detr import QUERIES, SIZES, imported, published, small_transformer

SHAPES = [(8, 10), (4, 5), (2, 3), (1, 2)]


def padded_batch():
    """Images [2, 3, 96, 128] of sizes 96 x 90 and 70 x 128, zero where padded."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 96, 128, generator=generator, dtype=torch.float64)
    sizes = [(96, 90), (70, 128)]
    shown = torch.zeros(2, 96, 128, dtype=torch.long)
    for mask, (height, width) in zip(shown, sizes):
        mask[:height, :width] = 1
    return images * shown[:, None], shown, sizes


@pytest.mark.parametrize("variant", ["one_stage", "refine", "two_stage"])
def test_logits_and_boxes_equal_transformers(variant):
    theirs = published(variant)
    ours = imported(theirs)
    images, shown, sizes = padded_batch()
    with torch.no_grad():
        wanted = theirs(images, pixel_mask=shown)
        got = ours(images, sizes)
    if variant == "two_stage":
        # The published code lets tokens compete that cannot propose; here none of them won, or N would differ.
        valid = got.encoder.valid
        best = wanted.enc_outputs_class[..., 0].topk(QUERIES, dim=1).indices
        assert valid.gather(1, best).all()
        torch.testing.assert_close(got.references[0], wanted.init_reference_points, atol=1e-10, rtol=0)
    assert got.pred_logits.shape == (1, 2, QUERIES, 7)
    torch.testing.assert_close(got.hidden.transpose(0, 1), wanted.intermediate_hidden_states, atol=1e-8, rtol=0)
    torch.testing.assert_close(got.pred_logits[-1], wanted.logits, atol=1e-8, rtol=0)
    torch.testing.assert_close(got.pred_boxes[-1], wanted.pred_boxes, atol=1e-8, rtol=0)


def features(shapes=SHAPES, batch=2, seed=0):
    """(maps, masks without padding), float64."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch, SIZES["dim"], *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return maps, [torch.zeros(batch, *shape, dtype=torch.bool) for shape in shapes]


def widened(maps, masks, shapes):
    """The same maps at the upper left of larger ones, of which the rest is padding full of noise."""
    generator = torch.Generator().manual_seed(9)
    out = []
    for level, mask, (height, width) in zip(maps, masks, shapes):
        larger = 10 * torch.randn(*level.shape[:2], height, width, generator=generator, dtype=level.dtype)
        padding = torch.ones(len(level), height, width, dtype=torch.bool)
        larger[:, :, : level.shape[2], : level.shape[3]] = level
        padding[:, : level.shape[2], : level.shape[3]] = mask
        out.append((larger, padding))
    return [list(part) for part in zip(*out)]


def scattered(module, seed=0):
    """The module in float64 with noise on every parameter, so that no zero of the initialisation hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def run(transformer, maps, masks, **options):
    memory = transformer.encode(maps, masks)
    return transformer.decode(memory, transformer.queries(memory), **options)


def cut(decoded, place):
    """States and boxes at a place."""
    return SimpleNamespace(hidden=decoded.hidden[place], boxes_cxcywh=decoded.boxes_cxcywh[place])


def assert_same(first, second, atol=1e-10):
    for name in ("hidden", "boxes_cxcywh"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), atol=atol, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_does_not_change_any_output(variant):
    transformer = scattered(small_transformer(variant))
    maps, masks = features()
    padded = widened(maps, masks, [(11, 13), (6, 7), (3, 4), (2, 2)])
    assert_same(run(transformer, *padded), run(transformer, maps, masks))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_two_sizes_equals_two_singles(variant):
    transformer = scattered(small_transformer(variant))
    wide, tall = features(batch=1), features([(10, 6), (5, 3), (3, 2), (2, 1)], batch=1, seed=1)
    common = [(10, 10), (5, 5), (3, 3), (2, 2)]
    both = [widened(*single, common) for single in (wide, tall)]
    batch = [[torch.cat(pair) for pair in zip(both[0][part], both[1][part])] for part in (0, 1)]
    got = run(transformer, *batch)
    for index, single in enumerate((wide, tall)):
        own = run(transformer, *single)
        assert_same(cut(got, (slice(None), slice(index, index + 1))), own)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    transformer = scattered(small_transformer(variant)).train()
    memory = transformer.encode(*features())
    queries = transformer.queries(memory)
    decoded = transformer.decode(memory, queries)
    loss = decoded.hidden.square().sum() + decoded.boxes_cxcywh.square().sum()
    if queries.encoder_outputs is not None:
        loss = loss + queries.encoder_outputs.logits.square().sum() + queries.encoder_outputs.boxes_cxcywh.sum()
    loss.backward()
    without = [name for name, p in transformer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_permuting_queries_permutes_the_output(variant):
    transformer = scattered(small_transformer(variant))
    memory = transformer.encode(*features())
    queries = transformer.queries(memory)
    order = torch.randperm(QUERIES, generator=torch.Generator().manual_seed(2))
    shuffled = dataclasses.replace(
        queries,
        content=queries.content[:, order],
        position=queries.position[:, order],
        references=queries.references[:, order],
    )
    got, plain = transformer.decode(memory, shuffled), transformer.decode(memory, queries)
    assert_same(got, cut(plain, (slice(None), slice(None), order)))


@pytest.mark.parametrize("per_head", [False, True])
def test_the_mask_separates_appended_queries(per_head):
    transformer = scattered(small_transformer("two_stage"))
    memory = transformer.encode(*features())
    queries = transformer.queries(memory)
    plain = transformer.decode(memory, queries)
    generator = torch.Generator().manual_seed(4)
    boxes = 0.2 + 0.6 * torch.rand(2, 5, 4, generator=generator, dtype=torch.float64)
    appended = dataclasses.replace(
        queries,
        content=torch.cat([queries.content, torch.randn(2, 5, SIZES["dim"], generator=generator).double()], dim=1),
        position=None,  # encoded from the references, which for the first N is what they had
        references=torch.cat([queries.references, boxes], dim=1),
    )
    total = QUERIES + 5
    mask = torch.zeros(total, total, dtype=torch.bool)
    mask[:QUERIES, QUERIES:] = True
    wanted_shape = (2 * transformer.heads, total, total)
    masked = transformer.decode(memory, appended, mask.expand(wanted_shape) if per_head else mask)
    assert_same(cut(masked, (slice(None), slice(None), slice(QUERIES))), plain)
    seen = transformer.decode(memory, appended)
    assert (seen.hidden[:, :, :QUERIES] - plain.hidden).abs().max() > 1e-3
    assert (masked.hidden[:, :, QUERIES:] - seen.hidden[:, :, QUERIES:]).abs().max() > 1e-6


def test_learned_queries_need_a_position():
    transformer = small_transformer("refine").double()
    memory = transformer.encode(*features())
    queries = dataclasses.replace(transformer.queries(memory), position=None)
    with pytest.raises(UsageError, match="Queries.position"):
        transformer.decode(memory, queries)


@pytest.mark.parametrize(("variant", "reached"), [("refine", False), ("two_stage", False), ("plus_plus", True)])
def test_look_forward_twice_reaches_one_layer_back(variant, reached):
    transformer = scattered(small_transformer(variant))
    boxes = run(transformer, *features()).boxes_cxcywh
    heads = transformer.decoder.box_heads
    first = heads[0].layers[2].weight
    gradients = [torch.autograd.grad(boxes[layer].sum(), first, retain_graph=True)[0] for layer in range(3)]
    assert [bool(gradient.any()) for gradient in gradients] == [True, reached, False]


def test_fewer_proposals_than_queries_are_filled_with_the_whole_image():
    maps, masks = features([(2, 2), (1, 1)], batch=1)
    transformer = scattered(small_transformer("two_stage", levels=2))
    queries = transformer.queries(transformer.encode(maps, masks))
    assert queries.references.shape == (1, QUERIES, 4)
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64)
    assert (queries.references[0, 5:] == whole).all() and not (queries.references[0, :5] == whole).all(-1).any()
    padded = widened(maps, masks, [(8, 6), (4, 3)])  # tokens enough, proposals as few as before
    assert_same(run(transformer, *padded), run(transformer, maps, masks))


def test_invalid_tokens_are_flagged_and_never_chosen():
    transformer = scattered(small_transformer("plus_plus"))
    with torch.no_grad():
        transformer.query_maker.objectness.weight.zero_()  # all tokens tie: order alone would take the first
    maps, masks = features([(3, 120), (2, 60), (1, 30), (1, 15)])
    masks[0][:, :, 119:] = True
    outputs = transformer.queries(transformer.encode(maps, masks)).encoder_outputs
    first = outputs.valid[0, :360].view(3, 120)
    assert not first[:, 0].any() and first[:, 1:118].all() and not first[:, 118:].any()  # 0.5 / 119 is below 0.01
    queries = transformer.queries(transformer.encode(maps, masks))
    centres = queries.references[..., :2]
    assert outputs.boxes_cxcywh[~outputs.valid].eq(torch.tensor([0.5, 0.5, 1, 1])).all()
    assert not (queries.references == torch.tensor([0.5, 0.5, 1, 1])).all(-1).any() and centres.isfinite().all()


def test_sampling_is_kept_when_asked_for():
    transformer = scattered(small_transformer("refine"))
    maps, masks = features()
    plain, kept = run(transformer, maps, masks), run(transformer, maps, masks, keep_sampling=True)
    assert_same(plain, kept, atol=0)
    lead = (SIZES["decoder_layers"], 2, QUERIES, SIZES["heads"], SIZES["levels"], SIZES["points"])
    assert kept.sampling_locations.shape == (*lead, 2) and kept.sampling_weights.shape == lead
    torch.testing.assert_close(kept.sampling_weights.sum((-2, -1)), torch.ones(lead[:4], dtype=torch.float64))
    assert [reference.shape[-1] for reference in kept.references] == [2, 4, 4] and plain.sampling_weights is None
    torch.testing.assert_close(kept.references[1], kept.boxes_cxcywh[0])


def test_memory_gives_back_its_maps():
    transformer = scattered(small_transformer("one_stage", encoder_layers=0))
    maps, masks = features()
    for got, wanted in zip(transformer.encode(maps, masks).levels(), maps):
        assert torch.equal(got, wanted)


def test_sine_position_equals_transformers_within_the_image():
    from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrSinePositionEmbedding

    mask = torch.zeros(2, 6, 9, dtype=torch.bool)
    mask[0, 4:] = True
    mask[1, :, 5:] = True
    theirs = DeformableDetrSinePositionEmbedding(16, normalize=True)
    wanted = theirs((2, 32, 6, 9), mask.device, torch.float64, ~mask).permute(0, 2, 3, 1)
    got = sine_position(mask, 32, torch.float64)
    torch.testing.assert_close(got[~mask], wanted[~mask], atol=1e-12, rtol=0)
    assert got.isfinite().all()


def test_masks_show_the_cells_of_an_image():
    masks = level_masks([(65, 128), (100, 40)], (128, 128), [(16, 16), (8, 8), (4, 4), (2, 2)])
    shown = [((~mask).any(2).sum(1).tolist(), (~mask).any(1).sum(1).tolist()) for mask in masks]
    assert shown == [([9, 13], [16, 5]), ([5, 7], [8, 3]), ([3, 4], [4, 2]), ([2, 2], [2, 1])]


def test_update_of_points_and_boxes():
    change = torch.tensor([[0.0, 1.0, -2.0, 0.5]], dtype=torch.float64)
    box = refine_boxes(torch.tensor([[0.3, 0.6, 0.2, 0.4]], dtype=torch.float64), change)
    logit = [math.log(p / (1 - p)) for p in (0.3, 0.6, 0.2, 0.4)]
    wanted = 1 / (1 + np.exp(-(np.array(logit) + change.numpy())))
    np.testing.assert_allclose(box, wanted, atol=1e-12)
    point = refine_boxes(torch.tensor([[0.3, 0.6]], dtype=torch.float64), change)
    np.testing.assert_allclose(point[:, :2], wanted[:, :2], atol=1e-12)
    np.testing.assert_allclose(point[:, 2:], 1 / (1 + np.exp(-change[:, 2:].numpy())), atol=1e-12)
    assert inverse_sigmoid(torch.tensor([0.0, 1.0, -3.0, 7.0])).isfinite().all()


def test_autocast_keeps_boxes_and_logits_in_float32():
    transformer = small_transformer("plus_plus").train()
    for head in transformer.decoder.box_heads:
        torch.nn.init.normal_(head.layers[-1].weight)
    branch = TextBranch(SIZES["dim"], WordBank(micro.vocabulary()))
    maps, masks = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = run(transformer, [level.float() for level in maps], masks)
        logits = branch(decoded.hidden[-1])
    boxes = decoded.boxes_cxcywh
    assert boxes.dtype == logits.dtype == torch.float32
    # Computed in it, too, and not cast to it.
    changes = boxes[0].logit() - decoded.references[0].logit()
    assert (changes.bfloat16().float() - changes).abs().max() > 1e-4
    (decoded.boxes_cxcywh.sum() + logits.sum()).backward()
    assert all(p.grad.isfinite().all() for p in transformer.parameters() if p.grad is not None)


def test_dynamo_traces_the_transformer_without_a_break():
    transformer = small_transformer("plus_plus", encoder_layers=1, decoder_layers=2)
    maps, masks = features()
    maps = [level.float() for level in maps]
    compiled = torch.compile(lambda *inputs: run(transformer, *inputs), backend="eager", fullgraph=True)
    assert_same(compiled(maps, masks), run(transformer, maps, masks), atol=1e-6)


def test_text_branch_equals_a_float64_reference():
    words = micro.vocabulary()
    branch = TextBranch(SIZES["dim"], WordBank(words), scale=9.0).eval()
    with torch.no_grad():
        branch.projection.weight.copy_(micro.wave(tuple(branch.projection.weight.shape)))
        branch.bias.fill_(-1.5)
    hidden = micro.wave((2, 3, SIZES["dim"]), 0.37)
    region = hidden.double().numpy() @ branch.projection.weight.detach().double().numpy().T
    region = region + branch.projection.bias.detach().double().numpy()
    region /= np.linalg.norm(region, axis=-1, keepdims=True)
    wanted = 9 * region @ words.embeddings.double().numpy().T - 1.5
    np.testing.assert_allclose(branch(hidden).detach(), wanted, atol=1e-5)
    np.testing.assert_allclose(branch.train()(hidden).detach(), wanted[..., : words.num_base], atol=1e-5)
    with torch.no_grad():
        branch.log_scale.fill_(50.0)
    np.testing.assert_allclose(
        branch(hidden).detach() + 1.5, 100 * (wanted[..., : words.num_base] + 1.5) / 9, atol=1e-3
    )
    with pytest.raises(UsageError, match="initial scale of the text classifier"):
        TextBranch(SIZES["dim"], WordBank(words), scale=0)


def test_branches_start_rare():
    hidden = torch.zeros(1, 2, SIZES["dim"])
    torch.testing.assert_close(ClosedSetBranch(SIZES["dim"], 5)(hidden).sigmoid(), torch.full((1, 2, 5), 0.01))
    logits = TextBranch(SIZES["dim"], WordBank(micro.vocabulary()))(hidden)
    assert (logits + math.log(99)).abs().max() <= 1 / 0.07 + 1e-4  # around the same bias by no more than the scale


class Trunk(torch.nn.Module):
    """Three maps of strides 8, 16 and 32 by pooling."""

    def forward(self, images):
        return {f"res{i}": F.avg_pool2d(images, 2**i) for i in (3, 4, 5)}


def tiny_model(variant, branches=None):
    transformer = small_transformer(variant)
    number = transformer.num_branches if branches is None else branches
    heads = [ClosedSetBranch(SIZES["dim"], 5) for _ in range(number)]
    return DeformableDETR(
        Trunk(), MultiScaleNeck([3, 3, 3], SIZES["dim"]), transformer, heads, ["res3", "res4", "res5"]
    )


@pytest.mark.parametrize(("variant", "branches"), [("one_stage", 1), ("refine", 3)])
def test_only_the_last_layer_is_classified_at_test(variant, branches):
    model = tiny_model(variant)
    assert len(model.class_branches) == branches
    images, sizes = torch.randn(2, 3, 64, 96), [(64, 96), (40, 50)]
    trained = model(images, sizes)
    tested = model.eval()(images, sizes)
    assert trained.pred_logits.shape == (3, 2, QUERIES, 5) and tested.pred_logits.shape == (1, 2, QUERIES, 5)
    assert trained.pred_boxes.shape == tested.pred_boxes.shape == (3, 2, QUERIES, 4)
    torch.testing.assert_close(tested.pred_logits[0], model(images, sizes, all_layers=True).pred_logits[-1])
    torch.testing.assert_close(tested.pred_logits[0], model.class_branches[-1](tested.hidden[-1]))


def test_wrong_parts_are_named():
    with pytest.raises(UsageError, match="2 class branches.*requires 3"):
        tiny_model("refine", branches=2)
    with pytest.raises(UsageError, match="unknown variant 'three_stage'.*plus_plus"):
        DeformableTransformer("three_stage")
    with pytest.raises(UsageError, match="multiple of 4"):
        DeformableTransformer(dim=10, heads=2)
