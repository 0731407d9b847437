"""Diagnosis of a cache, and of a client's path to it.

`probe_server` gathers the facts about a cache; `rules` judges them without I/O. A client has no Python: its doctor is a
script in `client/`, which `client_scripts` fills in. Begin with `rules`.
"""
