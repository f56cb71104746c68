"""The same as ``ovdet2 bench vocabulary``: latency of a detector with more words."""

from ovdet2.bench.vocabulary import main

if __name__ == "__main__":
    main()
