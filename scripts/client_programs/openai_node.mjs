// openai for Node: completions, chat and a stream.
import assert from "node:assert";
import OpenAI from "openai";

const { OPENAI_BASE_URL, MODEL, CHAT_MODEL } = process.env;
const client = new OpenAI({ baseURL: OPENAI_BASE_URL, apiKey: "none" });
const done = await client.completions.create({
  model: MODEL, prompt: "1, 2, 3, 4,", max_tokens: 10, temperature: 0,
});
assert.equal(done.choices[0].text, " 5, 6, 7, ");
const asked = {
  model: CHAT_MODEL, temperature: 0,
  messages: [{ role: "user", content: "How many legs has a dog?" }],
};
const whole = await client.chat.completions.create(asked);
let text = "";
for await (const part of await client.chat.completions.create({ ...asked, stream: true })) {
  text += part.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);
assert.match(text, /4/);
console.log("completions, chat, a stream");
