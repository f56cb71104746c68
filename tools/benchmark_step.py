"""Time and memory of ViLD's training steps against Faster R-CNN's. See ``ovdet2 bench vild --help``."""

from ovdet2.methods.vild.bench import main

if __name__ == "__main__":
    main()
