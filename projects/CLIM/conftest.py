"""Puts this folder on pytest's search path, as `python projects/CLIM/train.py` puts it on Python's."""
