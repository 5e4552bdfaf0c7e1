"""Models on the paged cache: loading, probing, and the verifier's packed pass."""
