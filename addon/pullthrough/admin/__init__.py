"""The control socket: what the command line asks of a running daemon.

Begin with `server`; `commands` and `fleet_commands` have what is done for each verb.
"""
