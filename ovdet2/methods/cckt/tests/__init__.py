"""Tests of CCKT-Det."""
