"""Tests of CLIP-DETR."""
