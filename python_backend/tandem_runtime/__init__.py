"""Assembles a Triton with the Tandem backend in a checkout, starts it, and shows what it does.

The set-up runs before there is a virtual environment: what it imports needs the standard library
alone.
"""
