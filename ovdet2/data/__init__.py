"""Data sets, image reading, the making of samples, sources and loaders."""
