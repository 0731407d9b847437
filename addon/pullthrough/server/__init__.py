"""The plain port: models and pages by HTTP for those who ask this machine itself.

Begin with `blobserver`; `lookout` has the pages of the daemon.
"""
