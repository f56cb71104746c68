"""``python -m ovdet2`` is the ``ovdet2`` command."""

from ovdet2.cli import main

main()
