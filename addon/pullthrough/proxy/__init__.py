"""mitmproxy's side: hooks, policy for incoming connections, and the ways out for requests.

mitmproxy is imported only here and in `addon`. Begin with `connection_hooks` (who may connect, and where to) and
`request_hooks` (requests and answers).
"""
