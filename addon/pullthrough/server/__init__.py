"""The plain port: models and pages by HTTP for those who ask this machine itself.

Begin with `blob_server`; `status_routes` has the pages of the daemon.
"""
