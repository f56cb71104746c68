"""What the scores of a detector are worth: calibration and absent words, as HTML sections and as text.

All functions return strings; arguments are results of :mod:`~ovdet2.evaluation.calibration` and
:mod:`~ovdet2.evaluation.absent_words`.
"""

from collections.abc import Mapping
from typing import Any

from ovdet2.evaluation.error_analysis import SUBSETS
from ovdet2.report.html_parts import legend, line_chart, number, table, text, word

_LINES = {"novel": "novel, solid", "base": "base, dashed", "all": "all, dotted"}
_BINNINGS = {"mass": "bins of equal numbers of detections", "width": "bins of equal width"}


def calibration_section(result: Mapping[str, Any]) -> str:
    """Reliability curves and calibration errors; nothing if no detection counts.

    Args:
        result: of :func:`~ovdet2.evaluation.calibration.calibration`.
    """
    curves = {
        name: [(point["score"], point["precision"]) for point in result["subsets"][name]["curve"]]
        for name in SUBSETS
        if result["subsets"][name]["curve"]
    }
    if not curves:
        return ""
    ticks = [(value / 5, f"{value / 5:g}") for value in range(6)]
    chart = line_chart(curves, (0, 1), (0, 1), ticks, ticks, ("mean score of a bin", "share correct"), markers=True)
    rows = [
        [
            name,
            number(result["subsets"][name]["ECE"]),
            number(result["subsets"][name]["over_confidence"], sign=True),
            f"{result['subsets'][name]['correct']:,}",
            f"{result['subsets'][name]['detections']:,}",
        ]
        for name in SUBSETS
    ]
    head = ["", "ECE", "over-confidence", "correct", "detections"]
    return (
        f"<h2>Calibration</h2><p>{text(_rule_of_calibration(result))} Figures are percent.</p>"
        f"{legend({name: _LINES[name] for name in curves})}"
        f'<figure class="chart">{chart}<figcaption>A calibrated detector lies on the diagonal; below it, the scores are '
        f"too high.</figcaption></figure>{table(head, rows, range(1, len(head)))}"
    )


def absent_section(result: Mapping[str, Any] | None) -> str:
    """False positives on absent words; nothing for None.

    Args:
        result: of :func:`~ovdet2.evaluation.absent_words.absent_words`.
    """
    if not result:
        return ""
    rows = [
        [("word", word(row["word"])), number(row["false_positives_per_image"], 3), number(row["highest_score"], 3)]
        for row in result["per_word"]
    ]
    shares = list(result["score_quantiles"])
    quantiles = [
        [title, *(number(result[key].get(share), 3) for share in shares)]
        for title, key in (
            ("scores of detections", "score_quantiles"),
            ("highest score of an image", "highest_score_quantiles"),
        )
    ]
    return (
        f"<h2>Absent words</h2><p>{text(absent_line(result))}</p>"
        f"{table(['quantile', *shares], quantiles, range(1, len(shares) + 1))}"
        f"<h3>Words with the most false positives</h3>"
        f"{table(['word', 'false positives an image', 'highest score'], rows, (1, 2), 'wide')}"
    )


def absent_line(result: Mapping[str, Any]) -> str:
    """One sentence on absent words."""
    return (
        f"{result['words']:,} words that no image contains: {result['false_positives_per_image']:.3f} false positives per "
        f"image with a score above {result['threshold']:g} "
        f"({result['false_positives_per_image_and_word']:.4f} per word), in "
        f"{result['images_with_false_positives']:.1f}% of {result['images']:,} images."
    )


def calibration_lines(result: Mapping[str, Any]) -> list[str]:
    """The calibration errors for a terminal."""
    lines = [_rule_of_calibration(result), f"{'':<8}{'ECE':>8}{'over-confidence':>18}{'correct':>10}{'detections':>13}"]
    for name in SUBSETS:
        of_subset = result["subsets"][name]
        figures = "".join(
            f"{'-' if of_subset[key] is None else format(of_subset[key], '.2f'):>{width}}"
            for key, width in (("ECE", 8), ("over_confidence", 18))
        )
        lines.append(f"{name:<8}{figures}{of_subset['correct']:>10}{of_subset['detections']:>13}")
    return lines


def _rule_of_calibration(result):
    return (
        f"Expected calibration error of detections with a score of at least {result['floor']:g}, correct if matched at IoU "
        f"0.5, in at most {result['bins']} {_BINNINGS[result['binning']]}."
    )
