"""Time of building and reading a region cache. See ``python -m ovdet2.bench.cache --help``."""

from ovdet2.bench import cache
from ovdet2.errors import exit_on_error
from ovdet2.methods.vild.bench import cached_samples


def main(argv=None):
    """That benchmark, and training samples with cached regions against those without."""
    return cache.main(argv, more=[cached_samples])


if __name__ == "__main__":
    with exit_on_error():
        main()
