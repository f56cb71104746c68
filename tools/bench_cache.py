"""Time of building and reading a region cache, and of training samples with it. See ``ovdet2 bench cache --help``."""

import functools

from ovdet2.bench import cache
from ovdet2.methods.vild.bench import cached_samples

main = functools.partial(cache.main, more=[cached_samples])

if __name__ == "__main__":
    main()
