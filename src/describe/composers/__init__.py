"""Composers: rules, any OpenAI-compatible server, vLLM in this process, recorded answers."""
