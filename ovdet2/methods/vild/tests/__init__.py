"""Tests of ViLD."""
