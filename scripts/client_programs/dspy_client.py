"""dspy: a signature, by its chat adapter."""

import dspy
from where import CHAT_MODEL, OPENAI_URL

model = dspy.LM(
    f"openai/{CHAT_MODEL}", api_base=OPENAI_URL, api_key="none", temperature=0.0, max_tokens=200
)
dspy.configure(lm=model)
(text,) = model("How many legs has a dog?")
said = text if isinstance(text, str) else text["text"]
assert "4" in said, said
print("a question")
