"""Latency of a detector with more words. See ``ovdet2 bench vocabulary --help``."""

from ovdet2.bench.vocabulary import main

if __name__ == "__main__":
    main()
