"""Evaluation on base, novel and all classes."""

from ovdet2.evaluation.evaluation import Evaluation, load_evaluation  # noqa: F401
from ovdet2.evaluation.ov_evaluator import OpenVocabularyEvaluator  # noqa: F401
from ovdet2.evaluation.report import format_table  # noqa: F401
