"""Who guesses: a protocol, its drafters, and how they are loaded."""
