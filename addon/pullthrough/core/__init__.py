"""Values and grammars: what a digest, a route, a range, a manifest is, and what the errors are called.

Import anything from here. Nothing in this room does I/O, reads a clock, or knows any other room. Begin with `errors`,
then `records` and `route`.
"""
