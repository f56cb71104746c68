"""Data sets, image reading, mappers and loaders."""
