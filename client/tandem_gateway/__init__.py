"""The OpenAI API in front of a Triton server that has the Tandem backend."""

from tandem_gateway.app import create_app

__all__ = ["create_app"]
