"""Training so that the release works as released and fails when it is re-scaled."""
