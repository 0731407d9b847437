"""Finding out what is wrong with a cache or with a client's way to it.

`rules` judges and does no I/O; the others find the facts. Begin with `rules`.
"""
