"""Readers of data sets without boxes: captioned images, and images with labels.

A reader is a sequence of Detectron2-like dicts that are made when they are read: millions of images are held in a few
arrays in memory instead of one Python object each.
"""
