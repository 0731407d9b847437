"""The script for `mitmdump -s addon/ollama_cache.py`."""

from pullthrough.addon import OllamaCache

addons = [OllamaCache()]
