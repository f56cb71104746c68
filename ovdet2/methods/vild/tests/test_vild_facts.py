"""Published figures of ViLD are those that the headers of the configurations state."""

import re

import pytest

from ovdet2.config import find_config
from ovdet2.methods.vild.facts import EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_header_states_the_same_figures(name):
    header = " ".join(line[1:].strip() for line in find_config(name).read_text().splitlines() if line.startswith("#"))
    stated = header[header.index("Expected:") :]
    assert EXPECTED[name]["source"] in stated
    figures = {key: value for kind in ("bbox", "segm") for key, value in EXPECTED[name].get(kind, {}).items()}
    assert figures
    for key, value in figures.items():
        word = key.removeprefix("AP50-")
        assert re.search(rf"\b{word} {value}\b", stated), (key, value, stated)
