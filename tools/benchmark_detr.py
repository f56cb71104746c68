"""Time and memory of Deformable DETR against that of transformers. See ``ovdet2 bench detr --help``."""

from ovdet2.bench.detr import main

if __name__ == "__main__":
    main()
