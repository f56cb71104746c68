"""CLIM: contrastive language-image mosaic pre-training of an open_clip model (Wu et al., 2023)."""
