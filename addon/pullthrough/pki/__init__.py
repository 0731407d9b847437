"""The certificate authority: made, renewed, and distributed to clients.

Import `rollover.Rollover` to sign, `client_setup` for the scripts and documents that set clients up.
Begin with `authority`.
"""
