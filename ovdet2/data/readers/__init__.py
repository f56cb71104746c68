"""Readers of data sets without boxes: captioned images, and images with labels.

A reader is a sequence of Detectron2-like dicts that are made when they are read, so that millions of images are some
arrays in memory and not one Python object each.
"""
