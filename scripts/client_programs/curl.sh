#!/bin/sh
# Triton's generate and generate_stream, and the gateway.
set -eu
body='{"text_input": "1, 2, 3, 4,", "max_tokens": 10, "temperature": 0}'
for kind in generate generate_stream; do
    curl --fail --silent --show-error "http://$TRITON_HTTP/v2/models/$MODEL/$kind" -d "$body" |
        grep --quiet ' 5, 6'
done
curl --fail --silent --show-error "$OPENAI_BASE_URL/completions" \
    -H "Content-Type: application/json" \
    -d "{\"model\": \"$MODEL\", \"prompt\": \"1, 2, 3, 4,\", \"max_tokens\": 10, \"temperature\": 0}" |
    grep --quiet ' 5, 6, 7, '
curl --fail --silent --show-error "$OPENAI_BASE_URL/models" | grep --quiet "$CHAT_MODEL"
echo "generate, generate_stream, completions, models"
