"""Suspicions about a json in general: boxes of another form, category ids of another numbering.

Shapes: M boxes. A suspicion needs a habit of many records: a few accidents cause none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ovdet2.data.datasets.findings import Finding
from ovdet2.data.datasets.validity import TOLERANCE

_ENOUGH = 10  # minimum number of records for a suspicion
_ENOUGH_SHARES = 3  # one pixel is no object: fewer boxes suffice
_FIT, _LEAVE = 0.9, 0.25  # shares of boxes, see _corners
_FIT_CENTRES, _LEAVE_CENTRES = 0.98, 0.05
_SHARE = 1.1  # largest share of an image; some tools write a little more than 1
_SHOWN = 5


def suspect_boxes(rows: np.ndarray, ids: Sequence[int | None]) -> list[Finding]:
    """Suspicions about the form of the boxes.

    Args:
        rows: array [M, 6]: x, y, width, height as in the json, and the image's width and height, infinite if unknown.
        ids: M annotation ids, None for an annotation without one.
    """
    for kind, rule in (("shares", _shares), ("xyxy", _corners), ("centres", _centres)):
        judged = np.arange(len(rows)) if kind == "shares" else np.flatnonzero(np.isfinite(rows[:, 4]))
        if not len(judged):
            continue
        x, y, third, fourth, image_width, image_height = rows[judged].T
        with np.errstate(over="ignore"):  # a sum that overflows is outside too
            leaves = (x + third > image_width + TOLERANCE) | (y + fourth > image_height + TOLERANCE)
        reason = rule(x, y, third, fourth, image_width, image_height, leaves)
        if reason is not None:  # one reading of the boxes at most is right
            text, affected = reason
            shown = [ids[row] for row in judged[affected][:_SHOWN]]
            more = ", ..." if affected.sum() > _SHOWN else ""
            where = f"; annotations {', '.join(map(str, shown))}{more}"
            return [Finding(f"suspected-{kind}", None, None, text + where)]
    return []


def _shares(x, y, third, fourth, image_width, image_height, leaves):
    """Nearly all numbers are at most 1: read as pixels, every object would lie within the first pixel of its image."""
    small = np.abs(np.stack([x, y, third, fourth])).max(axis=0) <= _SHARE
    if len(x) >= _ENOUGH_SHARES and small.sum() >= _FIT * len(x):
        return f"of {len(x)} boxes {small.sum()} have no number above 1", small
    return None


def _corners(x, y, third, fourth, image_width, image_height, leaves):
    """Read as corners, nearly all boxes lie in their image; read as (x, y, width, height), many extend beyond it.

    (Boxes that truly are (x, y, width, height) fit as corners only near the upper left corner of the image.)
    """
    right, bottom = image_width + TOLERANCE, image_height + TOLERANCE
    fit = int(((third > x) & (fourth > y) & (third <= right) & (fourth <= bottom)).sum())
    if len(x) >= _ENOUGH and fit >= _FIT * len(x) and leaves.sum() >= _LEAVE * len(x):
        text = (
            f"of {len(x)} boxes {fit} lie in their image as (x1, y1, x2, y2), {leaves.sum()} extend beyond it as "
            "(x, y, w, h)"
        )
        return text, leaves
    return None


def _centres(x, y, third, fourth, image_width, image_height, leaves):
    """Read as centres, all boxes lie in their image; read as corners of the upper left, several extend beyond it.

    (Of boxes that truly are (x, y, width, height), some are near the left or upper edge and do not fit as centres.)
    """
    fits = (x - third / 2 >= -TOLERANCE) & (x + third / 2 <= image_width + TOLERANCE)
    fits &= (y - fourth / 2 >= -TOLERANCE) & (y + fourth / 2 <= image_height + TOLERANCE)
    if len(x) >= _ENOUGH and fits.sum() >= _FIT_CENTRES * len(x) and leaves.sum() >= _LEAVE_CENTRES * len(x):
        text = (
            f"of {len(x)} boxes {fits.sum()} lie in their image as (centre x, centre y, w, h), {leaves.sum()} extend "
            "beyond it as (x, y, w, h)"
        )
        return text, leaves
    return None


def suspect_shift(used: Mapping[int, int], category_ids: set[int]) -> list[Finding]:
    """Category ids that are unknown, but all become known if shifted by one or read as list positions.

    Args:
        used: {category id: number of its annotations}.
        category_ids: of the categories.
    """
    ids, total = set(used), sum(used.values())
    unknown = sum(used[category_id] for category_id in ids - category_ids)
    if not unknown or total < _ENOUGH:
        return []
    count = len(category_ids)
    readings = {
        "each plus 1 is known": {category_id + 1 for category_id in ids} <= category_ids,
        "each minus 1 is known": {category_id - 1 for category_id in ids} <= category_ids,
        f"all are positions 0 to {count - 1} in the list of categories": ids <= set(range(count)),
        f"all are positions 1 to {count} in the list of categories": ids <= set(range(1, count + 1)),
    }
    for reading, holds in readings.items():
        if holds:
            seen = f"{unknown} of {total} annotations have an unknown id; of the {len(ids)} ids in use {reading}"
            return [Finding("suspected-shift", None, None, seen)]
    return []
