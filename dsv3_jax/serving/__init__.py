"""A server for generation that speaks OpenAI's API."""
