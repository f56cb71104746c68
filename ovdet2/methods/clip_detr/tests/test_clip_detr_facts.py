"""Published figures are those that the headers of the configurations state."""

import re

import pytest

from ovdet2.config import find_config
from ovdet2.methods.clip_detr.facts import EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
def test_header_states_the_same_figures(name):
    header = " ".join(line[1:].strip() for line in find_config(name).read_text().splitlines() if line.startswith("#"))
    stated = header[header.index("Expected:") :]
    assert "not run here" in stated and "not run here" in EXPECTED[name]["source"]
    assert EXPECTED[name]["bbox"]
    for key, value in EXPECTED[name]["bbox"].items():
        assert re.search(rf"\b{value}\b", stated), (key, value, stated)
