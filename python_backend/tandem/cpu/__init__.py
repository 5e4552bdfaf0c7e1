"""The CPU wing: packed products, C kernels that read the pool in place, passes as graphs."""
