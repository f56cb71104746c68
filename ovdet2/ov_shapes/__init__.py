"""OV-Shapes, the embedded benchmark: a generated world, its teachers, rows and runner."""
