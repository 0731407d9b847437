"""Bytes to clients, in threads: TLS contexts, taken connections, senders.

Handed sockets by `proxy` and `server`; asks the loop for decisions and moves the bytes by itself. Begin with
`delivery`.
"""
