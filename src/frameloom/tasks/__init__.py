"""One folder per task, one file per method."""
