"""Time and memory of the evaluation against pycocotools and lvis. See ``python -m ovdet2.bench.evaluation --help``."""

from ovdet2.bench.evaluation import main
from ovdet2.errors import exit_on_error

if __name__ == "__main__":
    with exit_on_error():
        main()
