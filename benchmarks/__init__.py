"""Benchmarks of time and memory: scripts that print a table. No pipeline stage depends on them."""
