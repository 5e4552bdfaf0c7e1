"""What starts and assembles a Triton here, and fetches what it and the tests need."""
