"""Checks a verifier and its drafter offline: does speculation pay, and if not, why."""
