"""The certificate authority: made, renewed, and carried to clients.

Import `rollover.Rollover` to sign, `client_setup` for the scripts and documents that clients are set up with.
Begin with `ca`.
"""
