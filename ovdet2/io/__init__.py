"""Files: atomic writes, json, safetensors, weight files, images."""
