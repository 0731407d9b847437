"""What the system gives: files, threads, clocks, the host's addresses, work that is done once for all who ask.

Nothing here knows models or HTTP. Begin with `platform`; `clock` says which clock measures what.
"""
