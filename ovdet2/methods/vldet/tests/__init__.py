"""Tests of Detic's networks."""
