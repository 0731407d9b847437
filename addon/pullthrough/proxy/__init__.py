"""mitmproxy's side: hooks, policy where connections come in, and the ways that requests leave it.

mitmproxy is imported here and in `addon` only. Begin with `connection_hooks` (who may connect, and where to) and
`request_hooks` (requests and answers).
"""
