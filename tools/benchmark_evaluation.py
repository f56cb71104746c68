"""The same as ``ovdet2 bench evaluation``: time and memory of the evaluation against pycocotools and lvis."""

from ovdet2.bench.evaluation import main

if __name__ == "__main__":
    main()
