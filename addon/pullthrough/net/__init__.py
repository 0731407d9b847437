"""Who may connect, and where connections may lead: address policy, parent proxies, limits.

Policy and bookkeeping only: the code that opens sockets asks here first. Begin with `address_policy`, then
`client_acl`.
"""
