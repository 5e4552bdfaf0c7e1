"""What stands between the engine and Triton: requests, metrics, log and signals."""
