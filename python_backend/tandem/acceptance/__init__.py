"""From the verifier's pass to the tokens that each sequence keeps."""
