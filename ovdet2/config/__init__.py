"""Configuration: core keys, the protocol and discovery of methods, safe loading."""

from ovdet2.config.keys import get_cfg
from ovdet2.config.load import find_config, load_config, settle_device, without_training_parts
from ovdet2.config.method import Method
from ovdet2.config.methods import check_methods, find_methods, methods_of

__all__ = [
    "Method",
    "check_methods",
    "find_config",
    "find_methods",
    "get_cfg",
    "load_config",
    "methods_of",
    "settle_device",
    "without_training_parts",
]
