"""The same as ``ovdet2 bench cache``: time of building and reading a region cache, and of training samples with it."""

import functools

from ovdet2.bench import cache
from ovdet2.methods.vild.bench import cached_samples

main = functools.partial(cache.main, more=[cached_samples])

if __name__ == "__main__":
    main()
