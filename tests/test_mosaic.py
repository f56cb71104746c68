"""Mosaics: every image once, exact boxes, and canvases against a loop over cells."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ovdet2.data.mosaic import compose_mosaics, draw_mosaics, grid_boxes
from ovdet2.errors import UsageError


def test_32_images_as_in_the_paper():
    mosaics, rest = draw_mosaics(32)
    assert [len(mosaic) for mosaic in mosaics] == [2, 3, 4] and rest.tolist() == [29, 30, 31]
    assert torch.equal(torch.cat([mosaic.flatten() for mosaic in mosaics]), torch.arange(29))
    mosaics, rest = draw_mosaics(128, singles=3)  # four processes of 32, in one
    assert [len(mosaic) for mosaic in mosaics] == [2, 3, 4] * 4 and len(rest) == 12


@given(
    count=st.integers(1, 200),
    grids=st.sets(st.integers(1, 5), min_size=1),
    singles=st.integers(0, 12),
    seed=st.none() | st.integers(0, 1000),
)
def test_every_image_is_used_exactly_once(count, grids, singles, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    smallest = min(grids) ** 2 + singles
    if count < smallest:
        with pytest.raises(UsageError, match=f"batch of {count} images.*at least {smallest}"):
            draw_mosaics(count, grids, singles, generator)
        return
    mosaics, rest = draw_mosaics(count, grids, singles, generator)
    used = torch.cat([*(mosaic.flatten() for mosaic in mosaics), rest])
    assert sorted(used.tolist()) == list(range(count))
    assert mosaics and len(rest) >= singles
    assert all(mosaic.shape[0] == mosaic.shape[1] and len(mosaic) in grids for mosaic in mosaics)


@pytest.mark.parametrize("grids, singles", [((), 0), ((2, 2), 0), ((0,), 0), ((2,), -1)])
def test_wrong_grids(grids, singles):
    with pytest.raises(UsageError, match="give each grid once"):
        draw_mosaics(32, grids, singles)


def test_the_generator_decides():
    def order(seed):
        mosaics, rest = draw_mosaics(32, generator=torch.Generator().manual_seed(seed))
        return torch.cat([*(mosaic.flatten() for mosaic in mosaics), rest])

    assert torch.equal(order(1), order(1)) and not torch.equal(order(1), order(2))


def test_boxes_are_exact():
    assert grid_boxes(2, 1024, 1024).tolist() == [
        [0, 0, 512, 512], [512, 0, 1024, 512], [0, 512, 512, 1024], [512, 512, 1024, 1024]
    ]  # fmt: skip
    thirds = grid_boxes(3, 90, 1024)
    assert thirds[5].tolist() == [torch.tensor(2048 / 3).item(), 30, 1024, 60]
    for grid in (1, 4, 5):
        boxes = grid_boxes(grid, 336, 252)
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        assert areas.sum().item() == pytest.approx(336 * 252, rel=1e-6) and boxes.amax(0)[2:].tolist() == [252, 336]


@settings(max_examples=25, deadline=None)
@given(
    cell=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    size=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    mode=st.sampled_from(["bicubic", "bilinear"]),
    seed=st.integers(0, 1000),
)
def test_canvases_against_a_loop(cell, size, mode, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2 + 4 + 9 + 4, 3, *cell, generator=generator)
    mosaics, _ = draw_mosaics(len(images), (2, 3), generator=generator)
    mosaics.append(torch.tensor([[3, 3], [1, 0]]))  # a mosaic of one's own, of a grid that is there already
    canvases, boxes, indices = compose_mosaics(images, mosaics, size, mode)
    assert canvases.shape == (len(mosaics), 3, *size)
    for canvas, box, index, mosaic in zip(canvases, boxes, indices, mosaics):
        rows = [torch.cat([images[i] for i in row], dim=2) for row in mosaic.tolist()]
        whole = torch.cat(rows, dim=1)[None]
        smaller = whole.shape[2] > size[0] or whole.shape[3] > size[1]
        torch.testing.assert_close(canvas, F.interpolate(whole, size, mode=mode, antialias=smaller)[0])
        assert index.tolist() == mosaic.flatten().tolist()
        assert torch.equal(box, grid_boxes(len(mosaic), *size))


def test_a_cell_lies_in_its_box():
    """At the canvas' own size each box cuts out its image, in non-square cells too."""
    images = torch.rand(13, 1, 5, 7)
    mosaics, rest = draw_mosaics(13, (3, 2))
    for mosaic in mosaics:
        grid = len(mosaic)
        (canvas,), (boxes,), (indices,) = compose_mosaics(images, [mosaic], (5 * grid, 7 * grid))
        for (x0, y0, x1, y1), index in zip(boxes.long().tolist(), indices):
            torch.testing.assert_close(canvas[:, y0:y1, x0:x1], images[index], atol=1e-6, rtol=0)
    assert len(rest) == 0


def test_gradients_reach_the_images():
    images = torch.rand(4, 3, 6, 6, requires_grad=True)
    canvases, _, _ = compose_mosaics(images, draw_mosaics(4, (2,))[0], (24, 24))
    canvases.sum().backward()
    assert images.grad.abs().amin() > 0
