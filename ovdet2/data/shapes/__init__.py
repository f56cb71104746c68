"""OV-Shapes: the procedural open-vocabulary benchmark that ships with the project."""
