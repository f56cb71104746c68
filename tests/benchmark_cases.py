"""A benchmark whose candidates need known memory, run as a module by the process that measures it."""

import numpy as np

from ovdet2.bench.harness import Benchmark, Candidate, Case, Comparison
from ovdet2.errors import DataError

MIB = 2**20


def plan(args):
    """Candidates that fill as many MiB as their name says, on the scale of the case; "bad" fails."""

    def fill(mebibytes, scale):
        if not mebibytes:
            raise DataError("there is nothing to fill.")
        return np.ones(mebibytes * scale * MIB, np.uint8).sum()

    candidates = [Candidate(str(size), lambda size=size: size, fill) for size in args.sizes]
    yield Comparison(candidates, [Case({"scale": str(scale)}, scale) for scale in args.scales], title="filling")


OPTIONS = {
    "--sizes": {"type": int, "nargs": "+", "default": [40]},
    "--scales": {"type": int, "nargs": "+", "default": [1, 2]},
}
main = Benchmark("tests.benchmark_cases", "Fill memory.", OPTIONS, plan, turns=2, turn_options=("--rounds",)).main

if __name__ == "__main__":
    main()
