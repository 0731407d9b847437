"""The plain port: models and pages by HTTP for clients that ask this machine itself.

Begin with `blob_server`; `status_routes` has the pages of the daemon.
"""
