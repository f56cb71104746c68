"""Time and memory of the evaluation against pycocotools and lvis. See ``ovdet2 bench evaluation --help``."""

from ovdet2.bench.evaluation import main

if __name__ == "__main__":
    main()
