"""haystack: its chat generator, whole and streamed."""

from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret
from where import CHAT_MODEL, OPENAI_URL

pieces = []
for callback in (None, lambda piece: pieces.append(piece.content)):
    generator = OpenAIChatGenerator(
        api_key=Secret.from_token("none"),
        model=CHAT_MODEL,
        api_base_url=OPENAI_URL,
        generation_kwargs={"temperature": 0},
        streaming_callback=callback,
    )
    question = [ChatMessage.from_user("How many legs has a dog?")]
    text = generator.run(messages=question)["replies"][0].text
    assert "4" in text, text
assert "".join(pieces) == text
print("chat, whole and streamed")
