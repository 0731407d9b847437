"""The control socket: what the command line asks of a running daemon.

Begin with `control`; `verbs` has what is done for each verb.
"""
