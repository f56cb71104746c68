"""File reading and writing: atomic writes, json, safetensors, weight files, images."""
