"""Measurements of time and memory: scripts that print a table. No stage of the pipeline reads them."""
