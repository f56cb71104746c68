"""Region samplers: which boxes, of which sub-image."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from ovdet2.modeling.weak import RegionSet, TextBatch
from ovdet2.modeling.weak.samplers import (
    ConceptGroup,
    MaxSize,
    NeighbourhoodBags,
    RandomRegions,
    TopK,
    WholeImage,
    areas,
    assign_to_cells,
    neighbour_chances,
    neighbours,
)
from tests.weak_cases import FULL, cell, proposals, texts

SAMPLERS = [
    WholeImage(),
    MaxSize(8),
    TopK(4),
    RandomRegions(3),
    ConceptGroup(4, 2),
    NeighbourhoodBags(min_objectness=0.5),
]


def mosaic():
    """One image with 2 x 2 cells."""
    edges = (0.0, 48.0, 96.0), (0.0, 32.0, 64.0)
    boxes = [(edges[0][x], edges[1][y], edges[0][x + 1], edges[1][y + 1]) for y in (0, 1) for x in (0, 1)]
    return TextBatch.of_cells([[cell(10 + number, (number,), box=box) for number, box in enumerate(boxes)]])


def overlap(boxes, frame):
    """Share of each box inside a frame, by counting points."""
    x, y = torch.meshgrid(torch.arange(0.125, 96, 0.25), torch.arange(0.125, 64, 0.25), indexing="ij")

    def inside(box):
        return (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])

    return torch.stack([(inside(box) & inside(frame)).sum() / inside(box).sum().clamp(min=1) for box in boxes])


def test_a_proposal_belongs_to_the_cell_that_holds_most_of_it():
    batch, boxes = mosaic(), proposals(20).proposal_boxes.tensor
    shares = torch.stack([overlap(boxes, frame) for frame in batch.boxes_xyxy], dim=1)
    found = assign_to_cells(boxes, batch.boxes_xyxy)
    for share, place in zip(shares, found.tolist()):
        assert share[place] >= share.max() - 0.02 and share.max() > 0.3


def test_a_proposal_that_is_mostly_outside_belongs_to_no_cell():
    assert assign_to_cells(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[7.5, 0, 40, 40]])).tolist() == [-1]


def test_the_whole_image():
    found = WholeImage()([proposals(), proposals(seed=1)], texts(cell(1), cell(2)))
    assert found.boxes_xyxy.tolist() == [list(FULL)] * 2 and found.image_of.tolist() == [0, 1]


@pytest.mark.parametrize("topk", [1, 3, 12])
def test_max_size_is_the_largest_of_the_best(topk):
    of_image = proposals()
    found = MaxSize(topk)([of_image], texts(cell(1)))
    best = of_image.proposal_boxes.tensor[:topk]
    assert torch.equal(found.boxes_xyxy[0], best[areas(best).argmax()])


def test_max_size_without_proposals_is_the_image():
    assert MaxSize(4)([proposals(0)], texts(cell(1))).boxes_xyxy.tolist() == [list(FULL)]


def test_max_size_in_a_mosaic_is_inside_each_cell():
    batch = mosaic()
    found = MaxSize(8)([proposals(30)], batch)
    assert found.cells.flatten().tolist() == [0, 1, 2, 3] and found.image_of.tolist() == [0] * 4
    for box, frame in zip(found.boxes_xyxy, batch.boxes_xyxy):
        assert (box[:2] >= frame[:2]).all() and (box[2:] <= frame[2:]).all() and areas(box) > 0


def test_top_k_are_the_best():
    of_image = proposals()
    assert torch.equal(TopK(5)([of_image], texts(cell(1))).boxes_xyxy, of_image.proposal_boxes.tensor[:5])
    assert not len(TopK(5)([proposals(0)], texts(cell(1))))


def test_random_regions_are_proposals_each_once_and_repeat_with_the_seed():
    batch, of_image = texts(cell(1)), proposals(20)
    torch.manual_seed(3)
    first, second = (RandomRegions(6)([of_image], batch).boxes_xyxy for _ in range(2))
    torch.manual_seed(3)
    again = RandomRegions(6)([of_image], batch).boxes_xyxy
    known = set(map(tuple, of_image.proposal_boxes.tensor.tolist()))
    assert len(set(map(tuple, first.tolist()))) == 6 and set(map(tuple, first.tolist())) <= known
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_concept_group_shares_a_tag():
    of_images = [proposals(seed=seed) for seed in range(5)]
    batch = texts(cell(1, (0, 2)), cell(2, (2,)), cell(3, (1,)), cell(4, (0,)), cell(5, (1,)))
    found = ConceptGroup(3, 2)(of_images, batch)
    # The second run has no common tag, the third is incomplete.
    assert found.group_of.tolist() == [0] * 6 and found.cells.flatten().tolist() == [0] * 3 + [1] * 3


def test_an_empty_concept_group_gives_no_region():
    assert not len(ConceptGroup(3, 2)([proposals(), proposals()], texts(cell(1, (0,)), cell(2, ()))))


class TestNeighbourhoods:
    def test_neighbours_have_the_size_of_the_seed_and_overlap_by_a_tenth(self):
        boxes = neighbours(torch.tensor([30.0, 20.0, 50.0, 30.0]), -0.1)
        assert torch.equal(boxes[4], torch.tensor([30.0, 20.0, 50.0, 30.0]))
        assert torch.allclose(boxes[:, 2:] - boxes[:, :2], torch.tensor([20.0, 10.0]))
        assert boxes[3].tolist() == [12, 20, 32, 30] and boxes[1].tolist() == [30, 11, 50, 21]

    def test_chances_are_those_of_the_equation(self):
        chances = neighbour_chances(torch.tensor([40.0, 20.0, 60.0, 30.0]), (64, 96), -0.1, 0.3)
        side, pole = (10 / 20) ** 3 * 0.3, 0.3  # across and above
        corner = (side * pole) ** 0.5
        expected = [corner, pole, corner, side, 1, side, corner, pole, corner]
        assert torch.allclose(chances, torch.tensor(expected, dtype=torch.float64))

    def test_there_is_no_neighbour_where_none_fits(self):
        chances = neighbour_chances(torch.tensor([1.0, 20.0, 21.0, 30.0]), (64, 96), -0.1, 0.3)
        assert chances[[0, 3, 6]].tolist() == [0, 0, 0] and chances[5] > 0  # 1 of 20 pixels at the left

    def test_bags_are_inside_the_image_and_hold_their_seed(self):
        of_image = proposals(12)
        found = NeighbourhoodBags(min_objectness=0.5)([of_image], texts(cell(1)))
        assert (found.boxes_xyxy >= 0).all() and (found.boxes_xyxy <= torch.tensor([96, 64, 96, 64])).all()
        known = of_image.proposal_boxes.tensor
        for group in found.group_of.unique():
            bag = found.boxes_xyxy[found.group_of == group]
            assert any(torch.allclose(box, seed) for box in bag for seed in known)

    def test_the_best_proposal_is_a_seed_if_none_is_good(self):
        small = Instances((64, 96), proposal_boxes=Boxes(torch.tensor([[40.0, 20.0, 42.0, 22.0]])), objectness_logits=torch.tensor([-3.0]))  # fmt: skip
        assert len(NeighbourhoodBags()([small], texts(cell(1))))
        assert not len(NeighbourhoodBags()([proposals(0)], texts(cell(1))))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
class TestEverySampler:
    def test_a_batch_is_its_singles(self, sampler):
        of_images, cells = [proposals(seed=seed) for seed in (0, 1)], [cell(1, (0,)), cell(2, (0,))]
        if isinstance(sampler, (ConceptGroup, NeighbourhoodBags, RandomRegions)):
            torch.manual_seed(0)
        both = sampler(of_images, texts(*cells))
        torch.manual_seed(0)
        if isinstance(sampler, ConceptGroup):
            singles = [TopK(4)([of_image], texts(of)) for of_image, of in zip(of_images, cells)]
        else:
            singles = [sampler([of_image], texts(of)) for of_image, of in zip(of_images, cells)]
        assert torch.equal(both.boxes_xyxy, torch.cat([single.boxes_xyxy for single in singles]))
        assert both.image_of.tolist() == [0] * len(singles[0]) + [1] * len(singles[1])

    def test_no_image(self, sampler):
        found = sampler([], TextBatch.of_cells([]))
        assert isinstance(found, RegionSet) and len(found) == 0 and found.boxes_xyxy.shape == (0, 4)
