"""smolagents: its model classes, and a tool call."""

from smolagents import ChatMessage, LiteLLMModel, MessageRole, OpenAIServerModel, tool
from where import CHAT_MODEL, OPENAI_URL


@tool
def weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: where.
    """
    return f"sunny in {city}"


question = [
    ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "The weather in Paris?"}])
]
where = {"api_base": OPENAI_URL, "api_key": "none", "temperature": 0, "max_tokens": 100}
for model in (
    OpenAIServerModel(CHAT_MODEL, **where),
    LiteLLMModel(f"hosted_vllm/{CHAT_MODEL}", **where),
):
    assert model.generate(question).content
    (call,) = model.generate(question, tools_to_call_from=[weather]).tool_calls
    assert call.function.name == "weather", call
print("chat, and a tool that has to be called")
