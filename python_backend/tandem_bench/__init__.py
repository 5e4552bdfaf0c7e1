"""Measures the engine, the same through Triton, and other engines on the same work."""
