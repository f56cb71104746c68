"""Latency of a detector with more words. See ``python -m ovdet2.bench.vocabulary --help``."""

from ovdet2.bench.vocabulary import main
from ovdet2.errors import exit_on_error

if __name__ == "__main__":
    with exit_on_error():
        main()
