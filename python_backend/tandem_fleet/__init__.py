"""What a fleet of pods does under load, found out without a cluster.

Simulated pods compute it from what a step was measured to cost. Real ones, started on this machine
behind the deployed Envoy, are measured to check that. The dashboard shows the same of a live fleet.
"""
