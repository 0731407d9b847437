"""The certificate authority: made, renewed, and carried to clients.

Import `authorities.Authorities` to sign, `clientsetup` for the scripts and documents that clients are set up with.
Begin with `ca`.
"""
