"""The same as ``ovdet2 bench clip-detr``: time and memory of CLIP-DETR's training steps."""

from ovdet2.methods.clip_detr.bench import main

if __name__ == "__main__":
    main()
