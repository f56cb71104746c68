"""Predict which words are present in each image of a data set: see ovdet2/programs/build_concept_priors.py, or --help."""

from ovdet2.errors import exit_on_error
from ovdet2.programs.build_concept_priors import main

if __name__ == "__main__":
    with exit_on_error():
        main()
