"""Region caches: format, reader, writer, boxes and embedding; a guard against two writers."""
