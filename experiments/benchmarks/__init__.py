"""Benchmarks against the best public peers; see README.md beside this file."""
