"""Trains a drafter for a verifier: text from the verifier itself, training, evaluation."""
