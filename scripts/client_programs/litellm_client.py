"""litellm: chat and a stream by its vLLM provider, completions by its Triton provider."""

import litellm
from where import CHAT_MODEL, MODEL, OPENAI_URL, PROMPT, TRITON_HTTP

question = [{"role": "user", "content": "How many legs has a dog?"}]
where = {"api_base": OPENAI_URL, "api_key": "none"}
for provider in ("hosted_vllm", "openai"):
    name = f"{provider}/{CHAT_MODEL}"
    whole = litellm.completion(model=name, messages=question, temperature=0, **where)
    text = whole.choices[0].message.content
    assert "4" in text, text
    parts = litellm.completion(model=name, messages=question, temperature=0, stream=True, **where)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == text
answer = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt=PROMPT, max_tokens=10, temperature=0, **where
)
assert answer.choices[0].text.startswith(" 5, 6"), answer.choices[0].text
answer = litellm.completion(
    model=f"triton/{MODEL}",
    messages=[{"role": "user", "content": PROMPT}],
    api_base=f"http://{TRITON_HTTP}/v2/models/{MODEL}/generate",
    max_tokens=10,
)
assert answer.choices[0].message.content, answer
print("chat and streams as hosted_vllm/ and openai/, completions, its Triton provider")
