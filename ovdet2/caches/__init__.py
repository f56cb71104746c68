"""Region caches: format, reader, writer, boxes and embedding; locks against concurrent writers."""
