"""Time and memory of Deformable DETR against that of transformers. See ``python -m ovdet2.bench.detr --help``."""

from ovdet2.bench.detr import main
from ovdet2.errors import exit_on_error

if __name__ == "__main__":
    with exit_on_error():
        main()
