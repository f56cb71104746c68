"""Benchmarks: candidates take turns in one process (``python -m ovdet2.bench.<name>``). See :mod:`ovdet2.bench.harness`."""
