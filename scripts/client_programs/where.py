"""Where the server is, and what it should say."""

import os

OPENAI_URL = os.environ["OPENAI_BASE_URL"]
TRITON_HTTP, TRITON_GRPC = os.environ["TRITON_HTTP"], os.environ["TRITON_GRPC"]
MODEL, CHAT_MODEL = os.environ["MODEL"], os.environ["CHAT_MODEL"]
# A base model goes on counting, ten tokens far.
PROMPT, TEXT = "1, 2, 3, 4,", " 5, 6, 7, "
