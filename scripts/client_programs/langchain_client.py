"""langchain-openai: chat, a stream, a tool that has to be called, and a schema."""

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel
from where import CHAT_MODEL, MODEL, OPENAI_URL, PROMPT, TEXT

where = {"base_url": OPENAI_URL, "api_key": "none", "temperature": 0}
assert OpenAI(model=MODEL, max_tokens=10, **where).invoke(PROMPT) == TEXT
chat = ChatOpenAI(model=CHAT_MODEL, **where)
text = chat.invoke("How many legs has a dog?").content
assert "4" in text, text
assert "".join(part.content for part in chat.stream("How many legs has a dog?")) == text


class Weather(BaseModel):
    """The weather in a city."""

    city: str


bound = chat.bind_tools([Weather], tool_choice="required")
(call,) = bound.invoke("How is the weather in Paris?").tool_calls
assert call["name"] == "Weather" and isinstance(call["args"]["city"], str), call
for method in ("json_schema", "function_calling"):
    made = chat.with_structured_output(Weather, method=method).invoke("The weather in Rome")
    assert isinstance(made, Weather), made
print("completions, chat, a stream, a tool call, schemas by both methods")
