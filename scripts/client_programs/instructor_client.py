"""instructor: a model of pydantic, by tools and by a schema."""

import instructor
from openai import OpenAI
from pydantic import BaseModel
from where import CHAT_MODEL, OPENAI_URL


class User(BaseModel):
    name: str
    age: int


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=OPENAI_URL, api_key="none"), mode=mode)
    user = client.chat.completions.create(
        model=CHAT_MODEL,
        response_model=User,
        messages=[{"role": "user", "content": "Jason is 25 years old."}],
        temperature=0,
        max_retries=0,
    )
    assert isinstance(user.age, int), user
print("a model by tools, and by a schema")
