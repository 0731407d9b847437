"""Finding out what is wrong with a cache or with a client's way to it.

`rules` judges a cache and does no I/O, `probe_server` finds the facts. A client has no Python: its doctor is a script
in `client/`, which `client_scripts` fills in. Begin with `rules`.
"""
