"""A client for Tandem on Triton."""
