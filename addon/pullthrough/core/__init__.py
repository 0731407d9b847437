"""Values and grammars: digests, routes, ranges and manifests, and the package's errors.

Import anything from here. Nothing here does I/O, reads a clock, or imports another package of ours. Begin with
`errors`, then `records` and `routes`.
"""
