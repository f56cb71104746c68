"""Deformable DETR: the network, its losses, matching and post-processing."""
