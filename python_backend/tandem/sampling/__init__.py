"""From logits to a token: what a request changes in them, and noise keyed by position."""
