"""The OpenAI dialect over HTTP: chat and text completions with SSE, models, embeddings, tokenising."""
