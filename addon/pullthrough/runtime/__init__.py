"""Services of the operating system: files, threads, clocks, the host's addresses; and calls shared by all who wait.

Nothing here knows about models or HTTP. Begin with `platform`; `clock` says which clock measures what.
"""
