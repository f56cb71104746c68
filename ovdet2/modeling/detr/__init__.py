"""Deformable DETR: the graph from feature maps to logits and boxes."""
