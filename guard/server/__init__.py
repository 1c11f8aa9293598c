"""The guard behind HTTP: moderation in OpenAI's shape, and a guarded proxy before any model that speaks it."""
