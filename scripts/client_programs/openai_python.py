"""openai: completions, chat, a stream, a schema, and two turns with tools."""

import json

from openai import OpenAI
from pydantic import BaseModel
from where import CHAT_MODEL, MODEL, OPENAI_URL, PROMPT, TEXT

client = OpenAI(base_url=OPENAI_URL, api_key="none")
done = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=10, temperature=0)
assert done.choices[0].text == TEXT, done.choices[0].text
assert done.usage.completion_tokens == 10

question = [{"role": "user", "content": "How many legs has a dog?"}]
whole = client.chat.completions.create(model=CHAT_MODEL, messages=question, temperature=0)
parts = client.chat.completions.create(
    model=CHAT_MODEL,
    messages=question,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
parts = list(parts)
text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
assert text == whole.choices[0].message.content and "4" in text, text
assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


class City(BaseModel):
    name: str
    population: int


parsed = client.chat.completions.parse(
    model=CHAT_MODEL, messages=question, response_format=City, max_tokens=200, temperature=0
)
assert isinstance(parsed.choices[0].message.parsed, City)

tools = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
            },
        },
    }
]
messages = [{"role": "user", "content": "How is the weather in Paris?"}]
for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
    answer = client.chat.completions.create(
        model=CHAT_MODEL, messages=messages, tools=tools, tool_choice=choice, temperature=0
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    city = json.loads(call.function.arguments)["city"]
    messages += [
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": f"Sunny in {city}, 21 degrees."},
    ]
last = client.chat.completions.create(
    model=CHAT_MODEL, messages=messages, tools=tools, tool_choice="none", max_tokens=60
)
assert last.choices[0].message.content

response = client.responses.create(
    model=CHAT_MODEL, input="How many legs has a dog?", temperature=0
)
assert response.output_text == text, response.output_text
print("completions, chat, a stream, a schema, two tool turns, responses")
