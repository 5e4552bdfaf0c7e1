"""llama-index: completion, chat and a stream."""

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from where import CHAT_MODEL, MODEL, OPENAI_URL, PROMPT, TEXT

where = {"api_base": OPENAI_URL, "api_key": "none", "temperature": 0}
base = OpenAILike(model=MODEL, max_tokens=10, **where)
assert base.complete(PROMPT).text == TEXT
chat = OpenAILike(model=CHAT_MODEL, is_chat_model=True, **where)
question = [ChatMessage(role="user", content="How many legs has a dog?")]
text = chat.chat(question).message.content
assert "4" in text, text
*_, last = chat.stream_chat(question)
assert last.message.content == text
print("completion, chat, a stream")
