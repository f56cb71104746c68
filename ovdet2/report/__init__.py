"""All drawing: html reports, pictures of detections and queries, score maps."""
