"""Requests in, answers out: what a client of a registry is told, and why it may have it.

Import `factory`, `service.Registry` and the values of `messages`. Begin with `service`, whose parts `factory` builds;
`grants` says who may read what, `freshness` when upstream is asked, `redirects` where a client is sent.
"""
