"""The engines that are compared, each as a worker process: `python -m tandem_bench.peers.NAME`."""
