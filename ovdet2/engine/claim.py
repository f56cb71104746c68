"""TEST.EXPECTED_RESULTS: the expected figures of a configuration, and whether they apply to a run."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from ovdet2.errors import UsageError

logger = logging.getLogger(__name__)

# Keys of paths, devices and records of a run, which do not change what is trained and measured.
_NEUTRAL = re.compile(
    r"OUTPUT_DIR|SEED|VIS_PERIOD|CUDNN_BENCHMARK|MODEL\.DEVICE|MODEL\.DETR\.ATTENTION_KERNEL|DATALOADER\.NUM_WORKERS|"
    r"SOLVER\.CHECKPOINT\w*|TEST\.(EVAL_PERIOD|EXPECTED_RESULTS|HTML_REPORT|DECODER_LAYERS|PROPOSALS_PER_IMAGE)|"
    r"[\w.]*(FILE|CACHE|WEIGHTS|PRETRAINED|LABEL_TABLE)"
)


def changed_by(overrides: Sequence[Any]) -> list[str]:
    """The keys of overrides [key, value, ...] that change what is trained or measured: no figures are expected then."""
    return [key for key in overrides[::2] if not _NEUTRAL.fullmatch(str(key))]


def check_claim(cfg: CfgNode, results: Mapping[str, Mapping[str, float]]) -> None:
    """Compare the figures of a run with TEST.EXPECTED_RESULTS, print each, and end the program if one is missed.

    Args:
        cfg: TEST.EXPECTED_RESULTS, a list of [task, metric, expected value, tolerance].
        results: {task: {metric: value}}.

    Raises:
        UsageError: the run did not measure a metric.
        SystemExit: with code 1, a value is farther from the expected one than the tolerance, or not finite.
    """
    missed = 0
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        if metric not in results.get(task, {}):
            raise UsageError(f"TEST.EXPECTED_RESULTS names {task}/{metric}, which this run did not measure: change it.")
        value = results[task][metric]
        if abs(value - expected) <= tolerance:  # False for NaN
            logger.info("%s %s: %.2f, as expected (%g +- %g).", task, metric, value, expected, tolerance)
        else:
            missed += 1
            logger.error(
                "%s %s: %.2f, expected %g +- %g (TEST.EXPECTED_RESULTS).", task, metric, value, expected, tolerance
            )
    if missed:
        sys.exit(1)
