"""Precision and recall of a concept prior against annotations, for several thresholds and numbers of words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ovdet2.priors.concept_prior import ConceptPriors
from ovdet2.priors.truth import Truth

if TYPE_CHECKING:  # types only: this package must not import ovdet2.data at run time
    from ovdet2.data.datasets.coco_json import Split


def quality(
    priors: ConceptPriors,
    truth: dict[int, Truth],
    split: "Split",
    thresholds: Sequence[float],
    tops: Sequence[int | None],
) -> list[dict[str, Any]]:
    """Precision and recall of a prior's words against the annotated classes of images.

    A pair (image, class) is selected if its score is at least rho and among the L highest of its image. Precision is
    the share of present classes among the selected ones whose presence is known. Recall is the share of the present
    classes that are selected. Both are over all images of the data set (micro average). An image without a list selects
    nothing, which lowers recall. Classes that a federated data set (LVIS) did not annotate in an image are ignored.

    Args:
        priors: :class:`~ovdet2.priors.concept_prior.ConceptPriors`.
        truth: dict of image id to :class:`~ovdet2.priors.truth.Truth`.
        split: the data set's :class:`~ovdet2.data.datasets.coco_json.Split`.
        thresholds: values of rho.
        tops: values of L, None for no limit.

    Returns:
        list of dicts, one for each (rho, L): "rho", "top", "words" (selected per image), and "base", "novel", "all",
        each (precision, recall) in [0, 1]. Precision is None if nothing is selected. Both are None for a group without
        any present class, which was not annotated.
    """
    groups = {
        "base": np.array(split.base_mask),
        "novel": ~np.array(split.base_mask),
        "all": np.full(len(split.names), True),
    }
    present = np.zeros(len(split.names), dtype=np.int64)  # images with each class
    columns, scores, ranks, status = [], [], [], []
    for image_id, (present_ids, absent) in truth.items():
        known = np.full(len(split.names), 0 if absent is None else -1, dtype=np.int8)
        known[list(absent or ())] = 0
        known[list(present_ids)] = 1
        present += known == 1
        index, score = (part.numpy() for part in priors.ranked(image_id, split.names))
        columns.append(index)
        scores.append(score)
        ranks.append(np.arange(len(index)))
        status.append(known[index])
    columns, scores, ranks, status = (np.concatenate(parts) for parts in (columns, scores, ranks, status))
    rows = []
    for rho in thresholds:
        for top in tops:
            chosen = scores >= np.float32(rho)
            if top is not None:
                chosen &= ranks < top
            row = {"rho": rho, "top": top, "words": chosen.sum() / len(truth)}
            for name, members in groups.items():
                row[name] = _figures(status[chosen & members[columns]], present[members].sum())
            rows.append(row)
    return rows


def _figures(status, present):
    """(precision, recall) of the selected pairs with ``status`` 1 (present), 0 (absent), -1 (not known)."""
    hits, judged = np.count_nonzero(status == 1), np.count_nonzero(status >= 0)
    if not present:
        return None, None
    return hits / judged if judged else None, hits / present


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, percentages with one decimal."""
    lines = [f"{'rho':>5} {'L':>4} {'words':>6}" + "".join(f"{g + ' P':>9} {g + ' R':>8}" for g in _GROUPS)]
    for row in rows:
        top = "all" if row["top"] is None else row["top"]
        figures = "".join(f"{_percent(row[g][0]):>9} {_percent(row[g][1]):>8}" for g in _GROUPS)
        lines.append(f"{row['rho']:>5.2f} {top:>4} {row['words']:>6.1f}" + figures)
    return "\n".join(lines)


_GROUPS = ("base", "novel", "all")


def _percent(value):
    return "-" if value is None else f"{100 * value:.1f}"
