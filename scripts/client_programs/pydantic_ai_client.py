"""pydantic-ai: an agent that answers in a type, and a plain one."""

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from where import CHAT_MODEL, OPENAI_URL


class City(BaseModel):
    name: str
    country: str


model = OpenAIChatModel(CHAT_MODEL, provider=OpenAIProvider(base_url=OPENAI_URL, api_key="none"))
settings = {"temperature": 0.0, "max_tokens": 200}
plain = Agent(model, model_settings=settings).run_sync("How many legs has a dog?")
assert "4" in plain.output, plain.output
for kind in (City, NativeOutput(City)):
    made = Agent(model, output_type=kind, model_settings=settings).run_sync("The capital of Italy?")
    assert isinstance(made.output, City), made
print("an agent, output in a type by tools and by a schema")
