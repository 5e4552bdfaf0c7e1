"""The CUDA wing: what a GPU needs that torch's operations don't give by themselves."""
