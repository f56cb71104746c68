"""Time and memory of CLIP-DETR's training steps. See ``ovdet2 bench clip-detr --help``."""

from ovdet2.methods.clip_detr.bench import main

if __name__ == "__main__":
    main()
