"""Experiments as data, and the one runner that trains, evaluates and tabulates them."""

from ovdet2.experiments.entry import Artefact, Column, Entry, Experiment, Plan

__all__ = ["Artefact", "Column", "Entry", "Experiment", "Plan"]
