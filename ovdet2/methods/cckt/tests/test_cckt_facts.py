"""Published figures are those that the headers of the configurations state."""

import re

import pytest

from ovdet2.config import find_config
from ovdet2.methods.cckt.facts import EXPECTED, PLUS_PLUS


@pytest.mark.parametrize("table, name", [(table, name) for table in (EXPECTED, PLUS_PLUS) for name in table])
def test_header_states_the_same_figures(table, name):
    header = " ".join(line[1:].strip() for line in find_config(name).read_text().splitlines() if line.startswith("#"))
    stated = header[header.index("Expected:") :]
    assert "not run here" in stated and "not run here" in table[name]["source"]
    assert table[name]["bbox"]
    for key, value in table[name]["bbox"].items():
        assert re.search(rf"\b{value}\b", stated), (key, value, stated)
