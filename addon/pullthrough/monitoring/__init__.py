"""What the daemon tells of itself: metrics, health, the status page, the form of log lines.

Begin with `watch` (what is looked at) and `metrics`. The page's files are in `share/`.
"""
