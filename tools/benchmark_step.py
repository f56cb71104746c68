"""The same as ``ovdet2 bench vild``: time and memory of ViLD's training steps against Faster R-CNN's."""

from ovdet2.methods.vild.bench import main

if __name__ == "__main__":
    main()
