"""mitmproxy's side: hooks, policy at its doors, and the ways that requests leave it.

mitmproxy is imported here and in `addon` only. Begin with `gate` (who and where) and `flows` (requests and answers).
"""
