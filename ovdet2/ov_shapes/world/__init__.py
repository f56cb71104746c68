"""The world of OV-Shapes: classes, geometry, renderer, scenes, captions."""
