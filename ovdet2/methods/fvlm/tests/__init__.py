"""Tests of F-VLM."""
