"""Draft, verify and accept: the phases of a step that compute."""
