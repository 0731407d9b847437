"""The tests of ollama-cache."""
