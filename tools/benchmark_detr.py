"""The same as ``ovdet2 bench detr``: time and memory of Deformable DETR against that of transformers."""

from ovdet2.bench.detr import main

if __name__ == "__main__":
    main()
