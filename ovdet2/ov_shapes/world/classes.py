"""The 65 classes of OV-Shapes, a texture and a shape each, and which of them are novel. Constants only, no imports.

Novel classes are of two kinds: *unseen nouns*, every texture of a shape that no base class has, and *unseen
combinations* of a texture and a shape that base classes have, each with other partners. Reports separate the two.
"""

TEXTURES = ("plain", "striped", "dotted", "checkered", "split")
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "arrow",
    "ring",
    "fish",
    "crown",
    "key",
    "bolt",
    "moon",
    "heart",
)
UNSEEN_SHAPES = ("moon", "heart")
UNSEEN_COMBINATIONS = (
    "striped star",
    "dotted arrow",
    "checkered crown",
    "plain key",
    "split fish",
    "striped ring",
    "dotted triangle",
)
UNSEEN_NOUNS = tuple(f"{texture} {shape}" for shape in UNSEEN_SHAPES for texture in TEXTURES)
NOVEL_NAMES = UNSEEN_NOUNS + UNSEEN_COMBINATIONS
BASE_NAMES = tuple(
    f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES if f"{texture} {shape}" not in NOVEL_NAMES
)
# Base first: the position in this tuple is the class index used by the generator.
CLASS_NAMES = BASE_NAMES + NOVEL_NAMES
