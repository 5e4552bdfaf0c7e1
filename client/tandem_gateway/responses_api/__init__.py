"""`POST /v1/responses`: what it asks for as a conversation, and a conversation's answer as its."""
