"""What the daemon reports about itself: metrics, health, the status page, the form of log lines.

Begin with `status` (what is looked at), `status_page` (how it is shown) and `metrics`. The pages' files are in
`share/`.
"""
